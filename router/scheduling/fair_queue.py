"""Who is admitted next: the tenant that was served the fewest tokens, and within a tenant who came first.

Virtual token counters, as in fair queueing: a tenant pays for the prompt tokens that are computed for it and for every
token that it gets. Whoever had nothing waiting comes back at the level of those who have: idle time is no credit. With
one tenant this is first come, first served.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterator

from router.scheduling.sequence import Sequence

# Counters that are remembered. A tenant beyond them starts at the level of those who wait, as a new one does.
MAX_TENANTS = 1024


class FairQueue:
    """The sequences that wait for a place."""

    def __init__(self) -> None:
        # Preempted ones: they were admitted before, and come first.
        self._returned: deque[Sequence] = deque()
        # By tenant, in order of arrival: the number of the arrival and the sequence.
        self._waiting: dict[str, dict[str, tuple[int, Sequence]]] = {}
        self._served: OrderedDict[str, int] = OrderedDict()
        self._num_arrivals = 0
        self._num_waiting = 0
        self._last_admitted = ""

    def __len__(self) -> int:
        return len(self._returned) + self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """In the order of admission. The sequence that was yielded last may be admitted or removed meanwhile."""
        yield from tuple(self._returned)
        heads = [entry for tenant in self._waiting if (entry := self._entry(tenant, self._line(tenant)))]
        heapq.heapify(heads)
        while heads:
            _, _, sequence, line = heapq.heappop(heads)
            yield sequence
            if entry := self._entry(sequence.tenant, line):
                heapq.heappush(heads, entry)

    def add(self, sequence: Sequence) -> None:
        """A sequence arrives."""
        if sequence.tenant not in self._waiting:
            level = self._level()
            self._waiting[sequence.tenant] = {}
            self._set(sequence.tenant, max(level, self._served.get(sequence.tenant, 0)))
        self._num_arrivals += 1
        self._waiting[sequence.tenant][sequence.sequence_id] = (self._num_arrivals, sequence)
        self._num_waiting += 1

    def put_back(self, sequence: Sequence) -> None:
        """A sequence lost its place; it is the next to get one."""
        self._returned.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence leaves, for whatever reason."""
        if sequence in self._returned:
            self._returned.remove(sequence)
            return
        line = self._waiting[sequence.tenant]
        del line[sequence.sequence_id]
        self._num_waiting -= 1
        if not line:
            del self._waiting[sequence.tenant]

    def admit(self, sequence: Sequence) -> None:
        """A sequence leaves because it has a place now; its tenant pays for what is left to compute of it."""
        is_new = sequence not in self._returned
        self.remove(sequence)
        if is_new:
            self._last_admitted = sequence.tenant
            self.charge(sequence.tenant, sequence.num_pending)

    def charge(self, tenant: str, num_tokens: int) -> None:
        """The tenant was served that many tokens."""
        self._set(tenant, self._served.get(tenant, 0) + num_tokens)

    def _level(self) -> int:
        """Where a tenant begins that had nothing waiting."""
        waiting = [self._served.get(tenant, 0) for tenant in self._waiting]
        return min(waiting) if waiting else self._served.get(self._last_admitted, 0)

    def _set(self, tenant: str, num_tokens: int) -> None:
        self._served[tenant] = num_tokens
        self._served.move_to_end(tenant)
        if len(self._served) > MAX_TENANTS:
            self._served.popitem(last=False)

    def _line(self, tenant: str) -> Iterator[tuple[int, Sequence]]:
        return iter(tuple(self._waiting[tenant].values()))

    def _entry(
        self, tenant: str, line: Iterator[tuple[int, Sequence]]
    ) -> tuple[int, int, Sequence, Iterator[tuple[int, Sequence]]] | None:
        """What orders a tenant's next sequence: its tenant's tokens, then its arrival, which is unique."""
        arrival, sequence = next(line, (0, None))
        return None if sequence is None else (self._served.get(tenant, 0), arrival, sequence, line)
