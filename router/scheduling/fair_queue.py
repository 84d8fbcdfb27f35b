"""Who is admitted next, and who gives up a place for it.

Between tenants it is the one that was served the fewest tokens. These are the virtual token counters of fair
queueing: a tenant is charged for the prompt tokens that are computed for it and for every token that it
receives. A tenant that had nothing waiting rejoins at the level of those that have, so idle time earns no
credit. Within a tenant it is the call that holds the fewest places, then the oldest sequence. Where every call
has one sequence, that is first come, first served.

A sequence that finds no room claims the place of a running one: from the tenant that holds most places, if that
holds at least two more than its own, else from the call of its own tenant that holds at least two more. A place
that moves thus always makes the shares more equal, and never moves back.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from typing import TypeVar

from router.scheduling.sequence import Sequence

# The number of tenants whose counters are remembered. Any other counts as a new tenant.
MAX_TENANTS = 1024


# The tokens of a tenant, the arrival number and the sequence of its next entry, and the entries after it.
_Entry = tuple[int, int, Sequence, Iterator[tuple[int, Sequence]]]
_Holder = TypeVar("_Holder", str, tuple[str, str])


class FairQueue:
    """The sequences that wait to be admitted, and how many places those that were admitted hold."""

    def __init__(self) -> None:
        # Preempted sequences, which were admitted before and come first.
        self._returned: deque[Sequence] = deque()
        # The arrival number and the sequence of each entry, by tenant and sequence id, in order of arrival.
        self._waiting: dict[str, dict[str, tuple[int, Sequence]]] = {}
        self._served: OrderedDict[str, int] = OrderedDict()
        # The places that tenants and calls hold; none is kept at zero.
        self._tenant_places: Counter[str] = Counter()
        self._call_places: Counter[tuple[str, str]] = Counter()
        self._num_arrivals = 0
        self._num_waiting = 0
        self._last_admitted = ""

    def __len__(self) -> int:
        return len(self._returned) + self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """The order of admission. The sequence yielded last may be admitted or removed meanwhile."""
        yield from tuple(self._returned)
        heads = self._heads()
        while heads:
            _, _, sequence, entries = heapq.heappop(heads)
            yield sequence
            if entry := self._next_entry(sequence.tenant, entries):
                heapq.heappush(heads, entry)

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence."""
        if sequence.tenant not in self._waiting:
            level = self._level()
            self._waiting[sequence.tenant] = {}
            self._set(sequence.tenant, max(level, self._served.get(sequence.tenant, 0)))
        self._num_arrivals += 1
        self._waiting[sequence.tenant][sequence.sequence_id] = (self._num_arrivals, sequence)
        self._num_waiting += 1

    def put_back(self, sequence: Sequence) -> None:
        """Queues a preempted sequence ahead of all others."""
        self._returned.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence, for whatever reason."""
        if sequence in self._returned:
            self._returned.remove(sequence)
            return
        entries = self._waiting[sequence.tenant]
        del entries[sequence.sequence_id]
        self._num_waiting -= 1
        if not entries:
            del self._waiting[sequence.tenant]

    def admit(self, sequence: Sequence) -> None:
        """Removes a sequence that now runs, and charges its tenant for what is left to compute of it."""
        is_new = sequence not in self._returned
        self.remove(sequence)
        self._tenant_places[sequence.tenant] += 1
        self._call_places[sequence.owner] += 1
        if is_new:
            self._last_admitted = sequence.tenant
            self.charge(sequence.tenant, sequence.num_pending)

    def rejoin(self, sequence: Sequence) -> None:
        """Gives a place back to a sequence that was admitted and has left it. What it computes is charged already."""
        self._tenant_places[sequence.tenant] += 1
        self._call_places[sequence.owner] += 1

    def leave(self, sequence: Sequence) -> None:
        """Frees the place of a sequence that was admitted."""
        _take_one(self._tenant_places, sequence.tenant)
        _take_one(self._call_places, sequence.owner)

    def claim(self, running: list[Sequence]) -> tuple[Sequence, Sequence] | None:
        """A waiting sequence, and the running one whose place it has the better right to."""
        heads = (sequence for _, _, sequence, _ in sorted(self._heads()))
        for claimant in itertools.chain(self._returned, heads):
            holder = self._holder(running, claimant)
            if holder is not None:
                return claimant, holder
        return None

    def newest_of_most(self, running: list[Sequence]) -> Sequence:
        """The newest sequence of the call that holds most places, of the tenant that holds most."""
        return max(
            reversed(running),
            key=lambda sequence: (self._tenant_places[sequence.tenant], self._call_places[sequence.owner]),
        )

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Adds to the number of tokens that a tenant was served."""
        self._set(tenant, self._served.get(tenant, 0) + num_tokens)

    def _level(self) -> int:
        """The counter at which a tenant begins that had nothing waiting."""
        waiting = [self._served.get(tenant, 0) for tenant in self._waiting]
        return min(waiting) if waiting else self._served.get(self._last_admitted, 0)

    def _set(self, tenant: str, num_tokens: int) -> None:
        self._served[tenant] = num_tokens
        self._served.move_to_end(tenant)
        if len(self._served) > MAX_TENANTS:
            self._served.popitem(last=False)

    def _holder(self, running: list[Sequence], claimant: Sequence) -> Sequence | None:
        """The running sequence whose place the claimant may take."""
        tenant, owner = claimant.tenant, claimant.owner
        newest = self.newest_of_most(running)
        if self._tenant_places[newest.tenant] >= self._tenant_places[tenant] + 2:
            return newest
        own = [sequence for sequence in running if sequence.tenant == tenant]
        if (
            own
            and self._call_places[(newest := self.newest_of_most(own)).owner] >= self._call_places[owner] + 2
        ):
            return newest
        return None

    def _heads(self) -> list[_Entry]:
        """A heap of the first entry of every tenant."""
        heads = [
            entry for tenant in self._waiting if (entry := self._next_entry(tenant, self._entries(tenant)))
        ]
        heapq.heapify(heads)
        return heads

    def _entries(self, tenant: str) -> Iterator[tuple[int, Sequence]]:
        """The entries of a tenant, those of calls with few places first. Sequences may be admitted meanwhile."""
        heap = [
            (self._call_places[sequence.owner], arrival, sequence)
            for arrival, sequence in self._waiting[tenant].values()
        ]
        heapq.heapify(heap)
        while heap:
            num_places, arrival, sequence = heapq.heappop(heap)
            if self._call_places[sequence.owner] > num_places:  # its call has been admitted meanwhile
                heapq.heappush(heap, (self._call_places[sequence.owner], arrival, sequence))
            else:
                yield arrival, sequence

    def _next_entry(self, tenant: str, entries: Iterator[tuple[int, Sequence]]) -> _Entry | None:
        """The heap entry of a tenant's next sequence: sorted by the tenant's tokens, then by arrival."""
        arrival, sequence = next(entries, (0, None))
        return None if sequence is None else (self._served.get(tenant, 0), arrival, sequence, entries)


def _take_one(places: Counter[_Holder], holder: _Holder) -> None:
    places[holder] -= 1
    if not places[holder]:
        del places[holder]
