"""The expert versions that this worker holds.

The worker knows nothing of epochs: a caller names the version that it wants of every slot, and gets that very
version or a refusal that says what is held instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from expert_worker.experts.expert import Expert
from moesaic.epoch import ExpertAddress, ExpertVersion
from moesaic.errors import FailedPrecondition

_SHOWN_DIGEST_CHARS = 12


@dataclass(frozen=True, slots=True)
class HeldExpert:
    """An expert and the digest of its version."""

    version: bytes
    expert: Expert


class ExpertStore:
    """Any number of versions of each slot. All methods may be called from any thread at any time.

    A call that was read keeps its experts, so that an expert in flight outlives its removal.
    """

    def __init__(self, on_change: Callable[[], object] = lambda: None) -> None:
        """`on_change` is called after every change, on the thread that made it."""
        self._on_change = on_change
        self._lock = threading.Lock()
        # The experts of a slot by digest. Each inner mapping is replaced as a whole, so that `get` needs no
        # lock.
        self._held: dict[ExpertAddress, Mapping[bytes, Expert]] = {}
        self._revision = 0

    @property
    def revision(self) -> int:
        """Grows with every expert that is added or removed."""
        return self._revision

    def add(self, address: ExpertAddress, held: HeldExpert) -> None:
        """Holds one more version of the slot, or replaces the expert of the same version."""
        with self._lock:
            self._held[address] = {**self._held.get(address, {}), held.version: held.expert}
            self._revision += 1
        self._on_change()

    def remove(self, address: ExpertAddress, version: bytes) -> None:
        """Gives up one version of the slot. Raises FailedPrecondition as `get` does."""
        with self._lock:
            self.get(address, version, field="version")
            left = {digest: expert for digest, expert in self._held[address].items() if digest != version}
            if left:
                self._held[address] = left
            else:
                del self._held[address]
            self._revision += 1
        self._on_change()

    def get(self, address: ExpertAddress, version: bytes, *, field: str) -> Expert:
        """The expert in this very version. Raises FailedPrecondition: NOT_HELD or WRONG_VERSION."""
        held = self._held.get(address)
        if held is None:
            raise FailedPrecondition(
                f"layer {address.layer} slot {address.slot} is not held by this worker",
                field=field,
                reason="NOT_HELD",
            )
        expert = held.get(version)
        if expert is None:
            shown = " and ".join(digest.hex()[:_SHOWN_DIGEST_CHARS] for digest in sorted(held))
            raise FailedPrecondition(
                f"layer {address.layer} slot {address.slot} is held in version {shown}, "
                "the call asks for another one",
                field=field,
                reason="WRONG_VERSION",
            )
        return expert

    def experts(self) -> Mapping[ExpertVersion, Expert]:
        """All experts, ordered by layer, slot and digest."""
        with self._lock:
            return {
                ExpertVersion(address, digest): expert
                for address, held in sorted(self._held.items())
                for digest, expert in sorted(held.items())
            }

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in memory, in the form that is held: packed, or quantised with their scales."""
        return sum(expert.num_bytes for expert in self.experts().values())
