"""Protobuf messages as JSON values: all fields are present, and enum values lose their prefix."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message


def plain(message: Message) -> dict[str, Any]:
    """A message as a dict of JSON values."""
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        values[field.name] = (
            [_plain(field, item) for item in value] if field.is_repeated else _plain(field, value)
        )
    return values


def _plain(field: Any, value: Any) -> Any:
    """One value of a field. The class of the descriptor depends on how protobuf was built."""
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return plain(value)
    if field.type == FieldDescriptor.TYPE_ENUM:
        names = {number.number: number.name for number in field.enum_type.values}
        return names[value].removeprefix(names[0].removesuffix("UNSPECIFIED")).lower()
    return value.hex() if isinstance(value, bytes) else value
