"""What an operator asks for: one change of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from moesaic.bundles import Manifest
from moesaic.epoch import DIGEST_BYTES, GateRow
from moesaic.errors import InvalidArgument
from moesaic.v1 import common_pb2, control_pb2

ChangeWord = Literal["swap", "add", "remove", "promote", "rollback"]

_WORDS: dict[int, ChangeWord] = {
    control_pb2.CHANGE_KIND_SWAP: "swap",
    control_pb2.CHANGE_KIND_ADD: "add",
    control_pb2.CHANGE_KIND_REMOVE: "remove",
    control_pb2.CHANGE_KIND_PROMOTE: "promote",
    control_pb2.CHANGE_KIND_ROLLBACK: "rollback",
}
MAX_OPERATOR = 128


@dataclass(frozen=True, slots=True)
class Shares:
    """The shares of a canary."""

    share: float
    shadow_share: float


@dataclass(frozen=True, slots=True)
class ChangeOrder:
    """A change as it was asked for. What a word does not need is empty."""

    word: ChangeWord
    bundle: bytes = b""
    name: str = ""
    # Empty: whichever epoch is current.
    expected_epoch: str = ""
    canary: Shares | None = None
    # Made on the spot, by (layer, index of the new expert among those of its layer).
    gate_rows: Mapping[tuple[int, int], GateRow] = field(default_factory=dict)
    epoch: str = ""
    operator: str = ""
    # Why, for the history.
    reason: str = ""

    @classmethod
    def from_proto(cls, request: control_pb2.ChangeRequest) -> ChangeOrder:
        """Raises InvalidArgument that names the field."""
        word = _WORDS.get(request.kind)
        if word is None:
            raise InvalidArgument("kind: must be swap, add, remove, promote or rollback", field="kind")
        brings = word in ("swap", "add")
        if brings and len(request.bundle) != DIGEST_BYTES:
            raise InvalidArgument(f"bundle: must be a digest of {DIGEST_BYTES} bytes", field="bundle")
        if word == "remove" and not request.name:
            raise InvalidArgument("name: is missing", field="name")
        if request.canary and not brings:
            raise InvalidArgument("canary: only a swap or an addition can be tried", field="canary")
        if request.gate_rows and word != "add":
            raise InvalidArgument("gate_rows: only new slots get rows", field="gate_rows")
        return cls(
            word,
            bundle=request.bundle,
            name=request.name,
            expected_epoch=request.expected_epoch,
            canary=_shares(request) if request.canary else None,
            gate_rows=dict(map(_row, request.gate_rows)),
            epoch=request.epoch,
            operator=request.operator[:MAX_OPERATOR],
        )

    def rows_of(self, manifest: Manifest) -> dict[int, GateRow]:
        """The rows that were made on the spot, by the index of the expert in the manifest.

        Raises InvalidArgument with field `gate_rows` for a row without an expert.
        """
        rows, left, seen = {}, dict(self.gate_rows), dict[int, int]()
        for index, expert in enumerate(manifest.experts):
            place = seen.get(expert.layer, 0)
            seen[expert.layer] = place + 1
            if (row := left.pop((expert.layer, place), None)) is not None:
                rows[index] = row
        if left:
            layer, place = min(left)
            raise InvalidArgument(
                f"gate_rows: the bundle has no expert {place} in layer {layer}", field="gate_rows"
            )
        return rows


def _shares(request: control_pb2.ChangeRequest) -> Shares:
    for name in ("share", "shadow_share"):
        if not 0 <= getattr(request, name) <= 1:
            raise InvalidArgument(f"{name}: must be in [0, 1]", field=name)
    if not request.share and not request.shadow_share:
        raise InvalidArgument("share: a canary needs a share of the requests or of their rows", field="share")
    return Shares(request.share, request.shadow_share)


def _row(message: common_pb2.GateRow) -> tuple[tuple[int, int], GateRow]:
    address, row = GateRow.from_proto(message)
    return (address.layer, address.slot), row
