"""The expert versions that this worker holds, by address.

The worker knows nothing of epochs: a caller names the version it wants for every slot, and gets that one or a refusal
that says what is held instead. Never another version, never a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from expert_worker.experts.expert import Expert
from moesaic.epoch import ExpertAddress
from moesaic.errors import FailedPrecondition

_SHOWN_DIGEST_CHARS = 12


@dataclass(frozen=True, slots=True)
class HeldExpert:
    """An expert and the digest of its version."""

    version: bytes
    expert: Expert


class ExpertStore:
    """Filled while the worker loads, then read from any thread."""

    def __init__(self) -> None:
        self._held: dict[ExpertAddress, HeldExpert] = {}

    def add(self, address: ExpertAddress, held: HeldExpert) -> None:
        self._held[address] = held

    def get(self, address: ExpertAddress, version: bytes, *, field: str) -> Expert:
        """The expert in just that version. Raises FailedPrecondition with reason NOT_HELD or WRONG_VERSION."""
        held = self._held.get(address)
        if held is None:
            raise FailedPrecondition(
                f"layer {address.layer} slot {address.slot} is not held by this worker",
                field=field,
                reason="NOT_HELD",
            )
        if held.version != version:
            raise FailedPrecondition(
                f"layer {address.layer} slot {address.slot} is held in version "
                f"{held.version.hex()[:_SHOWN_DIGEST_CHARS]}, the call asks for another one",
                field=field,
                reason="WRONG_VERSION",
            )
        return held.expert

    def experts(self) -> Mapping[ExpertAddress, Expert]:
        return {address: held.expert for address, held in sorted(self._held.items())}

    def versions(self) -> Mapping[ExpertAddress, bytes]:
        return {address: held.version for address, held in sorted(self._held.items())}

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in memory, as they are held: packed, or quantised with their scales."""
        return sum(held.expert.num_bytes for held in self._held.values())
