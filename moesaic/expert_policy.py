"""Which experts may compute a request: the words of clients, which gateways hand on and routers apply.

An entry is the name of a bundle, one of its tags, or LAYER:SLOT. Names and tags hold no colon, so that an entry with
one is an address or a mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

from moesaic.epoch import ExpertAddress
from moesaic.errors import InvalidArgument
from moesaic.v1 import inference_pb2

MAX_ENTRIES = 256
MAX_ENTRY_CHARS = 256

_ADDRESS = re.compile(r"([0-9]{1,9}):([0-9]{1,9})", re.ASCII)
_LISTS = ("deny", "allow", "require")

# What happens where no replica of an expert is left: the request waits for one, fails, or is answered without it.
OnMissing = Literal["wait", "fail", "substitute", "renormalise"]
ON_MISSING: tuple[OnMissing, ...] = get_args(OnMissing)
_ON_MISSING_PB: dict[OnMissing, inference_pb2.OnMissing] = {
    "wait": inference_pb2.ON_MISSING_WAIT,
    "fail": inference_pb2.ON_MISSING_FAIL,
    "substitute": inference_pb2.ON_MISSING_SUBSTITUTE,
    "renormalise": inference_pb2.ON_MISSING_RENORMALISE,
}
_ON_MISSING: dict[int, OnMissing] = {number: name for name, number in _ON_MISSING_PB.items()}


@dataclass(frozen=True, slots=True)
class ExpertPolicy:
    """Restricts the experts of a request. Policies are combined with `|`.

    `deny`: these never compute it. `allow`: of the experts that bundles added, these alone may; the model's own
    always may. `require`: the request fails unless its epoch has all of them. `top_k`: at most so many experts a token.
    `on_missing`: what happens where no replica of an expert is left; None: as the server is set. Raises InvalidArgument, which names the entry at fault: `experts.deny[2]`.
    """

    deny: Sequence[str] = ()
    allow: Sequence[str] = ()
    require: Sequence[str] = ()
    top_k: int | None = None
    on_missing: OnMissing | None = None

    def __post_init__(self) -> None:
        for name in _LISTS:
            object.__setattr__(self, name, _entries(f"experts.{name}", getattr(self, name)))
        if self.top_k is not None and not (type(self.top_k) is int and 1 <= self.top_k < 2**32):
            raise InvalidArgument(
                "experts.top_k: must be a whole number of at least 1", field="experts.top_k"
            )

        if self.on_missing is not None and self.on_missing not in ON_MISSING:
            raise InvalidArgument(
                f"experts.on_missing: must be one of {', '.join(ON_MISSING)}", field="experts.on_missing"
            )

    def __bool__(self) -> bool:
        """Whether it says anything."""
        return bool(self.deny or self.allow or self.require or self.top_k or self.on_missing)

    def __or__(self, other: ExpertPolicy) -> ExpertPolicy:
        """The entries of both, the smaller `top_k`, and the `on_missing` of the last that has one."""
        if not isinstance(other, ExpertPolicy):
            return NotImplemented
        limits = [policy.top_k for policy in (self, other) if policy.top_k is not None]
        lists = {name: (*getattr(self, name), *getattr(other, name)) for name in _LISTS}
        on_missing = other.on_missing or self.on_missing
        return ExpertPolicy(**lists, top_k=min(limits, default=None), on_missing=on_missing)

    def to_pb(self) -> inference_pb2.ExpertPolicy:
        return inference_pb2.ExpertPolicy(
            deny=self.deny,
            allow=self.allow,
            require=self.require,
            top_k=self.top_k,
            on_missing=on_missing_to_pb(self.on_missing),
        )

    @classmethod
    def from_pb(cls, message: inference_pb2.ExpertPolicy) -> Self:
        """Raises InvalidArgument."""
        top_k = message.top_k if message.HasField("top_k") else None
        return cls(message.deny, message.allow, message.require, top_k, on_missing_of(message.on_missing))


def on_missing_to_pb(on_missing: OnMissing | None) -> inference_pb2.OnMissing:
    return inference_pb2.ON_MISSING_UNSPECIFIED if on_missing is None else _ON_MISSING_PB[on_missing]


def on_missing_of(number: int) -> OnMissing | None:
    """None where it is unspecified. Raises InvalidArgument."""
    if number == inference_pb2.ON_MISSING_UNSPECIFIED:
        return None
    if number not in _ON_MISSING:
        raise InvalidArgument("experts.on_missing: there is no such policy", field="experts.on_missing")
    return _ON_MISSING[number]


def address_of(entry: str) -> ExpertAddress | None:
    """The expert that an entry names as LAYER:SLOT; None where it is the name of a bundle or a tag."""
    match = _ADDRESS.fullmatch(entry)
    return ExpertAddress(int(match[1]), int(match[2])) if match else None


def _entries(field: str, entries: Iterable[str]) -> tuple[str, ...]:
    """Each entry once, in its order."""
    if isinstance(entries, str | bytes):
        raise InvalidArgument(f"{field}: must be a list, also where it has one entry", field=field)
    listed = tuple(entries)
    if len(listed) > MAX_ENTRIES:
        raise InvalidArgument(f"{field}: must be at most {MAX_ENTRIES} entries", field=field)
    for index, entry in enumerate(listed):
        _check_entry(f"{field}[{index}]", entry)
    return tuple(dict.fromkeys(listed))


def _check_entry(field: str, entry: object) -> None:
    if not isinstance(entry, str) or not 1 <= len(entry) <= MAX_ENTRY_CHARS or "\0" in entry:
        raise InvalidArgument(
            f"{field}: must be a text of 1 to {MAX_ENTRY_CHARS} characters, none of them NUL", field=field
        )
    if ":" in entry and address_of(entry) is None:
        raise InvalidArgument(
            f"{field}: must be LAYER:SLOT, two whole numbers, or a name without a colon", field=field
        )
