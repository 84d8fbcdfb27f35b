"""The expert versions that this worker holds.

The worker knows nothing of epochs: a caller names the version that it wants of every slot, and gets that very
version or a refusal that says what is held instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from expert_worker.experts.expert import Expert
from moesaic.epoch import ExpertAddress, ExpertVersion
from moesaic.errors import Aborted, FailedPrecondition

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
        self.add_all({ExpertVersion(address, held.version): held.expert})

    def add_all(
        self, experts: Mapping[ExpertVersion, Expert], beside: Collection[ExpertVersion] = ()
    ) -> None:
        """Holds all of these versions from one moment on. Raises Aborted, and holds none of them, unless those of
        `beside` are held as well."""
        with self._lock:
            if any(digest not in self._held.get(address, {}) for address, digest in beside):
                raise Aborted(
                    "experts: a version was unloaded while others were loaded beside it", field="experts"
                )
            for (address, digest), expert in experts.items():
                self._held[address] = {**self._held.get(address, {}), digest: expert}
                self._revision += 1
        self._on_change()

    def remove_all(self, versions: Iterable[ExpertVersion]) -> list[Expert]:
        """Gives up these versions from one moment on; those that are not held are no error. Returns the experts."""
        removed: list[Expert] = []
        with self._lock:
            for address, digest in versions:
                left = dict(self._held.get(address, {}))
                if (expert := left.pop(digest, None)) is not None:
                    removed.append(expert)
                    self._keep(address, left)
        if removed:
            self._on_change()
        return removed

    def holds(self, version: ExpertVersion) -> bool:
        return version.digest in self._held.get(version.address, {})

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

    def _keep(self, address: ExpertAddress, left: Mapping[bytes, Expert]) -> None:
        """Leaves only these versions of a slot."""
        if left:
            self._held[address] = left
        else:
            del self._held[address]
        self._revision += 1

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in memory, in the form that is held: packed, or quantised with their scales."""
        return sum(expert.num_bytes for expert in self.experts().values())
