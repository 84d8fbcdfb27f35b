"""What to do next so that workers hold what the epochs in use need, and a candidate gets committed. Pure.

`plan` compares what is desired with what is observed, and is called again after every step: a process that died or
came back in between only changes what is observed. Versions go where they belong: those of the model folder's slots to
the workers that serve the slot, those of added slots to as many workers as there are replicas.

Where memory does not hold an old and a new version of a slot side by side, the old copy makes room on one worker at a
time, as long as another worker holds it: no version of an epoch in use is ever without a copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

from cluster.control.placement import Shelf, choose_shelves
from moesaic.epoch import Epoch, ExpertAddress, ExpertVersion
from moesaic.errors import FailedPrecondition, Unavailable

# In place of a bundle's digest: the version is in the model folder of the worker.
MODEL_FOLDER = b""


@dataclass(frozen=True, slots=True)
class Footprint:
    """The memory of one version: parameters that a worker holds in its own dtype, and bytes that it holds as they are."""

    parameters: int
    fixed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker that answers, as it was observed."""

    name: str
    host: str
    # The slots that it serves out of its model folder, also when it holds other versions of them now.
    home: frozenset[ExpertAddress]
    holdings: frozenset[ExpertVersion]
    # Of `holdings`: loaded, but not probed yet.
    unproven: frozenset[ExpertVersion] = frozenset()
    # Not of `holdings` any more: about to be given up.
    leaving: frozenset[ExpertVersion] = frozenset()
    available_bytes: int = 0
    bytes_per_parameter: float = 4.0
    # Whether it failed to load something a moment ago, and is left alone for a while.
    resting: bool = False

    @property
    def ready(self) -> frozenset[ExpertVersion]:
        return self.holdings - self.unproven

    def size(self, footprint: Footprint) -> int:
        """Bytes that a version takes here."""
        return round(footprint.parameters * self.bytes_per_parameter) + footprint.fixed_bytes


@dataclass(frozen=True, slots=True)
class Desired:
    """What workers shall hold.

    `living`: the epochs in which sequences are or will be computed, the most important first; the candidate, which is
    to be committed, is one of them.
    """

    living: tuple[Epoch, ...]
    replicas: int
    base_slots: Set[ExpertAddress]
    # Of the versions that bundles brought; and of the model folder's, by layer.
    footprints: Mapping[ExpertVersion, Footprint]
    base_footprints: Mapping[int, Footprint]
    candidate: Epoch | None = None

    def footprint(self, version: ExpertVersion) -> Footprint:
        known = self.footprints.get(version)
        return self.base_footprints[version.address.layer] if known is None else known

    def source(self, version: ExpertVersion) -> bytes:
        """The digest of the bundle that has a version, or MODEL_FOLDER."""
        for epoch in self.living:
            if epoch.versions.get(version.address) == version.digest:
                for bundle in epoch.bundles:
                    if version.address in bundle.experts:
                        return bundle.digest
        return MODEL_FOLDER


@dataclass(frozen=True, slots=True)
class Observed:
    """The workers that answer, and the epochs whose versions the routing table shows."""

    workers: tuple[Worker, ...]
    published: frozenset[str] = frozenset()
    # Whether the controller has heard all that it must know before it takes anything away.
    settled: bool = True


@dataclass(frozen=True, slots=True)
class Load:
    worker: str
    bundle: bytes
    versions: tuple[ExpertVersion, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    worker: str
    bundle: bytes
    versions: tuple[ExpertVersion, ...]


@dataclass(frozen=True, slots=True)
class Unload:
    """Takes versions out of the routing table, and then off the worker."""

    worker: str
    versions: tuple[ExpertVersion, ...]


@dataclass(frozen=True, slots=True)
class Publish:
    """Shows the versions of the candidate in the routing table."""

    epoch: str


@dataclass(frozen=True, slots=True)
class Commit:
    epoch: str


Action = Load | Probe | Unload | Publish | Commit


def plan(desired: Desired, observed: Observed) -> tuple[Action, ...]:
    """The next actions; those for different workers are independent. Empty: nothing is to be done now.

    What nobody needs goes first, because it gives memory back.
    """
    unloads = tuple(_unloads(desired, observed))
    if unloads:
        return unloads
    packing = _Packing(desired, observed)
    packing.pack()
    return packing.actions() or tuple(_probes(desired, observed)) or tuple(_publication(desired, observed))


def check_room(desired: Desired, observed: Observed) -> None:
    """Whether the candidate's versions fit beside what is in use, or worker by worker.

    Raises FailedPrecondition with reason OUT_OF_MEMORY and how much is missing where, Unavailable with reason
    NO_WORKER when no worker that answers serves a slot.
    """
    packing = _Packing(desired, observed)
    packing.pack()
    assert desired.candidate is not None
    if homeless := sorted(packing.homeless & desired.candidate.expert_versions):
        address = homeless[0].address
        raise Unavailable(
            f"no worker runs that serves layer {address.layer} slot {address.slot}",
            reason="NO_WORKER",
            retry_after_s=1.0,
        )
    lacking = {name: count for name, count in packing.lacking.items() if count}
    if lacking:
        hosts = {worker.name: worker.host for worker in observed.workers}
        where = ", ".join(
            f"{name} on {hosts[name]} lacks {count / (1 << 20):.1f} MiB"
            for name, count in sorted(lacking.items())
        )
        raise FailedPrecondition(
            f"memory would not hold the old and the new experts: {where}", reason="OUT_OF_MEMORY"
        )


def coverage(workers: Iterable[Worker]) -> frozenset[ExpertVersion]:
    """The versions of which some worker has a copy that is ready."""
    return frozenset[ExpertVersion]().union(*(worker.ready for worker in workers))


def is_complete(epoch: Epoch, workers: Iterable[Worker]) -> bool:
    """Whether every version of the epoch has a copy that is ready."""
    return epoch.expert_versions <= coverage(workers)


def _unloads(desired: Desired, observed: Observed) -> Iterator[Unload]:
    # Before the first epoch, workers hold what it will be made of.
    if not observed.settled or not desired.living:
        return
    needed = _needed(desired)
    for worker in observed.workers:
        idle = worker.holdings - needed
        if idle and not worker.leaving and not worker.resting:
            yield Unload(worker.name, tuple(sorted(idle)))


def _needed(desired: Desired) -> frozenset[ExpertVersion]:
    return frozenset[ExpertVersion]().union(*(epoch.expert_versions for epoch in desired.living))


def _probes(desired: Desired, observed: Observed) -> Iterator[Probe]:
    for worker in observed.workers:
        if not worker.resting:
            for bundle, versions in _by_source(desired, worker.unproven):
                yield Probe(worker.name, bundle, versions)


def _publication(desired: Desired, observed: Observed) -> Iterator[Action]:
    candidate = desired.candidate
    if candidate is not None and is_complete(candidate, observed.workers):
        if candidate.id not in observed.published:
            yield Publish(candidate.id)
        else:
            yield Commit(candidate.id)


def _by_source(
    desired: Desired, versions: Iterable[ExpertVersion]
) -> list[tuple[bytes, tuple[ExpertVersion, ...]]]:
    groups: dict[bytes, list[ExpertVersion]] = {}
    for version in sorted(versions):
        groups.setdefault(desired.source(version), []).append(version)
    return [(bundle, tuple(group)) for bundle, group in sorted(groups.items())]


@dataclass
class _Packing:
    """Packs the versions that are missing into the workers: first one copy of each, then the other copies."""

    desired: Desired
    observed: Observed
    loads: dict[str, list[ExpertVersion]] = field(default_factory=dict)
    evictions: dict[str, list[ExpertVersion]] = field(default_factory=dict)
    # Versions without any worker that could hold them; bytes by which each worker is too small.
    homeless: set[ExpertVersion] = field(default_factory=set)
    lacking: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._workers = {worker.name: worker for worker in self.observed.workers}
        self._room = {name: worker.available_bytes for name, worker in self._workers.items()}
        needed = _needed(self.desired)
        # Bytes that come back by themselves, as nobody needs what takes them.
        self._returning = {
            name: sum(self._size(version, name) for version in (worker.holdings - needed) | worker.leaving)
            for name, worker in self._workers.items()
        }
        self._copies: dict[ExpertVersion, set[str]] = {}
        for name, worker in self._workers.items():
            for version in worker.holdings:
                self._copies.setdefault(version, set()).add(name)
        self._needed = list(dict.fromkeys(_in_order(self.desired.living)))
        # How many versions of added slots each worker holds, or is about to.
        self._num_added = Counter(
            name
            for version in self._needed
            if version.address not in self.desired.base_slots
            for name in self._copies_of(version)
        )
        # By slot, the versions of it that are needed.
        self._of_slot: dict[ExpertAddress, list[ExpertVersion]] = {}
        for version in self._needed:
            self._of_slot.setdefault(version.address, []).append(version)

    def pack(self) -> None:
        for version in self._needed:
            if not self._copies.get(version):
                self._place_first(version)
        for version in self._needed:
            for name in self._targets(version):
                if version not in self._workers[name].holdings and name not in self._copies_of(version):
                    self._place(version, name)

    def actions(self) -> tuple[Action, ...]:
        """Evictions and loads of different workers: a worker that makes room loads in the next round."""
        evictions = [
            Unload(name, tuple(sorted(versions))) for name, versions in sorted(self.evictions.items())
        ]
        loads = [
            Load(name, bundle, group)
            for name, versions in sorted(self.loads.items())
            if name not in self.evictions
            for bundle, group in _by_source(self.desired, versions)
        ]
        return (*evictions, *loads)

    def _place_first(self, version: ExpertVersion) -> None:
        targets = self._targets(version)
        if not targets:
            self.homeless.add(version)
            return
        for name in targets:
            if self._place(version, name):
                return
        for name in targets:
            if self._make_room(version, name):
                return
        name = max(targets, key=lambda target: self._room[target] - self._size(version, target))
        self.lacking[name] = self.lacking.get(name, 0) + self._size(version, name) - max(0, self._room[name])
        self._room[name] = max(0, self._room[name] - self._size(version, name))

    def _place(self, version: ExpertVersion, name: str) -> bool:
        """A copy that fits only when bytes have come back is kept in mind, and loaded in a later round."""
        missing = self._size(version, name) - self._room[name]
        if missing > self._returning[name]:
            return False
        self._room[name] = max(0, -missing)
        if missing > 0:
            self._returning[name] -= missing
        else:
            self.loads.setdefault(name, []).append(version)
        self._copies.setdefault(version, set()).add(name)
        self._num_added[name] += version.address not in self.desired.base_slots
        return True

    def _make_room(self, version: ExpertVersion, name: str) -> bool:
        """Gives up copies that other workers have, too, if that is enough."""
        given_up: list[ExpertVersion] = []
        freed = 0
        for other in self._spare(version, name):
            if self._room[name] + freed >= self._size(version, name):
                break
            given_up.append(other)
            freed += self._size(other, name)
        if self._room[name] + freed < self._size(version, name):
            return False
        for other in given_up:
            self.evictions.setdefault(name, []).append(other)
            self._copies[other].discard(name)
        self._room[name] += freed - self._size(version, name)
        self._copies.setdefault(version, set()).add(name)
        return True

    def _spare(self, version: ExpertVersion, name: str) -> Iterator[ExpertVersion]:
        """Copies on a worker that may make room: those of the same slot and then, for a version that has been in use,
        those of added slots."""
        candidate = self.desired.candidate
        is_new = candidate is not None and not any(
            version in epoch.expert_versions for epoch in self.desired.living if epoch != candidate
        )
        others = () if is_new else self._needed
        for other in dict.fromkeys((*self._of_slot[version.address], *others)):
            same_slot = other.address == version.address
            if (
                other != version
                and (same_slot or other.address not in self.desired.base_slots)
                and other in self._workers[name].holdings
                and name in self._copies[other]
                and self._is_elsewhere(other, name)
            ):
                yield other

    def _is_elsewhere(self, version: ExpertVersion, name: str) -> bool:
        """Whether another worker has a ready copy that is not given up in this round."""
        return any(
            other != name and other in self._copies[version] and version in worker.ready
            for other, worker in self._workers.items()
        )

    def _targets(self, version: ExpertVersion) -> Sequence[str]:
        """The workers that should hold a version, those first that should get it first."""
        if version.address in self.desired.base_slots:
            return [worker.name for worker in self.observed.workers if self._serves(worker, version.address)]
        holders = self._copies_of(version)
        shelves = [
            Shelf(worker.name, worker.host, self._room[worker.name], self._num_added[worker.name])
            for worker in self.observed.workers
            if worker.name in holders or not worker.resting
        ]
        sizes = {name: self._size(version, name) for name in self._workers}
        return choose_shelves(shelves, sizes, self.desired.replicas, holders)

    def _serves(self, worker: Worker, address: ExpertAddress) -> bool:
        if worker.resting:
            return False
        return address in worker.home or any(
            version in worker.holdings for version in self._of_slot.get(address, ())
        )

    def _copies_of(self, version: ExpertVersion) -> set[str]:
        return self._copies.get(version, set())

    def _size(self, version: ExpertVersion, name: str) -> int:
        return self._workers[name].size(self.desired.footprint(version))


def _in_order(living: Iterable[Epoch]) -> Iterator[ExpertVersion]:
    for epoch in living:
        yield from sorted(epoch.expert_versions)
