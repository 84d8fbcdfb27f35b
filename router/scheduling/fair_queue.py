"""Admits the oldest sequence of the tenant that was served the fewest tokens.

These are the virtual token counters of fair queueing: a tenant is charged for the prompt tokens that are
computed for it and for every token that it receives. A tenant that had nothing waiting rejoins at the level
of those that have, so idle time earns no credit. With a single tenant this is first come, first served.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterator

from router.scheduling.sequence import Sequence

# The number of tenants whose counters are remembered. Any other counts as a new tenant.
MAX_TENANTS = 1024


class FairQueue:
    """The sequences that wait to be admitted."""

    def __init__(self) -> None:
        # Preempted sequences, which were admitted before and come first.
        self._returned: deque[Sequence] = deque()
        # The arrival number and the sequence of each entry, by tenant and sequence id, in order of arrival.
        self._waiting: dict[str, dict[str, tuple[int, Sequence]]] = {}
        self._served: OrderedDict[str, int] = OrderedDict()
        self._num_arrivals = 0
        self._num_waiting = 0
        self._last_admitted = ""

    def __len__(self) -> int:
        return len(self._returned) + self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """The order of admission. The sequence yielded last may be admitted or removed meanwhile."""
        yield from tuple(self._returned)
        heads = [
            entry for tenant in self._waiting if (entry := self._next_entry(tenant, self._entries(tenant)))
        ]
        heapq.heapify(heads)
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
        if is_new:
            self._last_admitted = sequence.tenant
            self.charge(sequence.tenant, sequence.num_pending)

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

    def _entries(self, tenant: str) -> Iterator[tuple[int, Sequence]]:
        return iter(tuple(self._waiting[tenant].values()))

    def _next_entry(
        self, tenant: str, entries: Iterator[tuple[int, Sequence]]
    ) -> tuple[int, int, Sequence, Iterator[tuple[int, Sequence]]] | None:
        """The heap entry of a tenant's next sequence: sorted by the tenant's tokens, then by arrival."""
        arrival, sequence = next(entries, (0, None))
        return None if sequence is None else (self._served.get(tenant, 0), arrival, sequence, entries)
