"""What is almost right: bytes, JSON and protobuf messages near valid ones, as Hypothesis strategies.

What is wholly random is refused at the first check. So every strategy begins with something valid and spoils a little of
it; without a change at all it gives the valid thing itself.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

# Numbers at which types, limits and signs end.
_POWERS = (2**bits for bits in (15, 16, 31, 32, 53, 63, 64))
EDGES = (
    *range(4),
    7,
    31,
    63,
    127,
    255,
    256,
    4096,
    *(edge for power in _POWERS for edge in (power - 1, power)),
)
_MAX_CHANGES = 4

# Marks, as JSON spells them, of what no value stands for: text that is bare of quotes, and a name that occurs again.
_BARE, _AGAIN = "\\ue000", "\\ue001"
_TEXTS = (
    "",
    "\0",
    "4294967296",
    "\ud800",
    "\U0001f600",
    "a" * 5000,
    "../../etc/passwd",
    "1:2",
    ":",
    "\u202e",
    "-1",
    "null",
)
_BARE_NUMBERS = ("1e999", "-1e999", "1e-999", "-0", "NaN", "-Infinity", "01", "1.", "0x10")
# More than a float64 holds, and around the 4,300 digits that Python converts, in either direction.
_HUGE_NUMBERS = ("1" + 400 * "0", 4300 * "9", 4301 * "9")


@st.composite
def bytes_near(draw: st.DrawFn, valid: st.SearchStrategy[bytes]) -> bytes:
    """Some bits turned over, numbers put in (lengths that lie), parts cut off, left out, doubled."""
    raw = draw(valid)
    for _ in range(draw(st.integers(0, _MAX_CHANGES))):
        start = draw(st.integers(0, len(raw)))
        end = min(
            len(raw), start + draw(st.sampled_from((1, 2, 4, 8, 40)) | st.integers(1, max(1, len(raw))))
        )
        part = raw[start:end]
        raw = raw[:start] + draw(_spoilt(part)) + raw[end:]
    return raw


@st.composite
def _spoilt(draw: st.DrawFn, part: bytes) -> bytes:
    match draw(st.integers(0, 5)):
        case 0:
            return bytes((*part[:-1], part[-1] ^ 1 << draw(st.integers(0, 7)))) if part else b""
        case 1:
            width = draw(st.sampled_from((1, 2, 3, 4, 8)))
            number = draw(st.sampled_from(EDGES)) % (1 << 8 * width)
            return number.to_bytes(width, draw(st.sampled_from(("little", "big"))))
        case 2:
            return b""
        case 3:
            return part * draw(st.integers(2, 4))
        case 4:
            return draw(st.binary(max_size=12))
        case _:
            return bytes(len(part))


@st.composite
def json_near(draw: st.DrawFn, valid: Any) -> bytes:
    """Text of a JSON value whose parts are removed, renamed, doubled, or of another type or size."""
    holder = [copy.deepcopy(valid)]
    for _ in range(draw(st.integers(0, _MAX_CHANGES))):
        # The whole last: Hypothesis prefers what comes first.
        container, key = draw(st.sampled_from([*_places(holder)][::-1]))
        change = draw(st.integers(0, 7))
        if change == 0 and container is not holder:
            del container[key]
        elif change == 1 and isinstance(container, dict):
            container[draw(st.sampled_from((*_TEXTS, *container)))] = container.pop(key)
        elif change == 2 and isinstance(container, dict):
            container[key + json.loads(f'"{_AGAIN}"')] = container[key]
        else:
            container[key] = draw(_instead_of(container[key]))
    return (
        json.dumps(holder[0]).replace(f'"{_BARE}', "").replace(f'{_BARE}"', "").replace(_AGAIN, "").encode()
    )


def _instead_of(value: Any) -> st.SearchStrategy[Any]:
    """Mostly of the same type, so that it is not refused for that alone."""
    if isinstance(value, bool) or value is None:
        return _LEAVES
    if isinstance(value, int | float):
        return _NUMBERS | _HUGE | _LEAVES
    if isinstance(value, str):
        return st.sampled_from((*_TEXTS, value + value, value[:-1])) | _LEAVES
    if isinstance(value, list):
        return st.sampled_from((value * 2, value[::-1], value[:-1])) | st.lists(_LEAVES, max_size=9) | _LEAVES
    return st.dictionaries(st.sampled_from((*_TEXTS, *value)), _LEAVES, max_size=3) | _LEAVES


def _nested(depth: int) -> str:
    """As text: a value of that depth could not be dumped."""
    return _bare(depth * "[" + depth * "]")


def _bare(text: str) -> str:
    mark = json.loads(f'"{_BARE}"')
    return f"{mark}{text}{mark}"


_HUGE = st.sampled_from([*map(_bare, _HUGE_NUMBERS)])
_NUMBERS: st.SearchStrategy[Any] = (
    st.sampled_from((*EDGES, *(-edge for edge in EDGES)))
    | st.sampled_from([*map(_bare, (*_BARE_NUMBERS, *_HUGE_NUMBERS))])
    | st.floats()
)
_LEAVES = (
    st.sampled_from((None, True, False, [], {}, *_TEXTS))
    | _NUMBERS
    | st.sampled_from([*map(_nested, (30, 40, 200, 2000))])
)


def _places(container: Any) -> Iterator[tuple[Any, Any]]:
    """Every value below a container, by what holds it and its key there."""
    for key in list(range(len(container)) if isinstance(container, list) else container):
        yield container, key
        if isinstance(container[key], list | dict):
            yield from _places(container[key])


@st.composite
def message_near(draw: st.DrawFn, valid: Message) -> bytes:
    """Bytes of a message whose fields are removed, doubled, or at the edges of their types."""
    message = copy.deepcopy(valid)
    for _ in range(draw(st.integers(0, _MAX_CHANGES))):
        parts = list(_parts(message))
        part = parts[draw(st.integers(0, len(parts) - 1))]
        if part.DESCRIPTOR.fields:
            _change(draw, part, draw(st.sampled_from(list(part.DESCRIPTOR.fields))))
    return message.SerializeToString()


def _parts(message: Message) -> Iterator[Message]:
    """A message and all that are set below it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if not field.is_repeated:
            yield from _parts(value)
        elif not _is_map(field):
            for item in value:
                yield from _parts(item)


def _change(draw: st.DrawFn, part: Message, field: FieldDescriptor) -> None:
    held = getattr(part, field.name)
    if draw(st.booleans()) and draw(st.booleans()):
        part.ClearField(field.name)
    elif _is_map(field):
        _change_map(draw, held, field.message_type)
    elif field.message_type is not None:
        (held.add() if field.is_repeated else held).SetInParent()
    elif not field.is_repeated:
        setattr(part, field.name, draw(_values(field)))
    elif held and draw(st.booleans()):
        held[draw(st.integers(0, len(held) - 1))] = draw(_values(field))
    else:
        held.extend(
            draw(
                st.lists(
                    _values(field) | st.sampled_from(list(held) or [draw(_values(field))]),
                    min_size=1,
                    max_size=3,
                )
            )
        )


def _change_map(draw: st.DrawFn, held: Any, entry: Any) -> None:
    key, value = draw(_values(entry.fields_by_name["key"])), entry.fields_by_name["value"]
    if value.message_type is None:
        held[key] = draw(_values(value))
    else:
        held[key].SetInParent()


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Of one item of a field that is no message."""
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_FLOAT:
            return st.floats(width=32) | st.sampled_from((0.0, 1.0, -1.0))
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return st.floats() | st.sampled_from((0.0, 1.0, 1e308))
        case FieldDescriptor.CPPTYPE_ENUM:
            return st.integers(-1, 6) | st.sampled_from((2**31 - 1, -(2**31)))
        case FieldDescriptor.CPPTYPE_STRING:
            texts = st.text(max_size=8) | st.sampled_from(
                [text for text in _TEXTS if text.isprintable() or text == "\0"]
            )
            return (
                texts
                if field.type == FieldDescriptor.TYPE_STRING
                else st.binary(max_size=40) | st.sampled_from((bytes(32), bytes(4000)))
            )
        case kind:
            low, high = _RANGES[kind]
            return st.sampled_from(
                [number for edge in EDGES for number in (edge, -edge) if low <= number <= high]
            )


_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
