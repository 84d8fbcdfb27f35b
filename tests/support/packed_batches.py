"""Batches as the scheduler makes them of prompts whose tokens do not matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from router.attention.packed_batch import PackedBatch, pack
from router.attention.views import AttentionLayout
from router.scheduling.block_pool import BlockPool
from router.scheduling.scheduler import Limits, Scheduler
from router.scheduling.sequence import Sequence


def packed_batches(
    lengths: Mapping[str, int], layout: AttentionLayout, pool: BlockPool, budget: int
) -> Iterator[PackedBatch]:
    """Prompts of these lengths in chunks beside one another, with four decoded tokens each."""
    scheduler = Scheduler(Limits(budget, 8), pool)
    for name, length in lengths.items():
        scheduler.add(Sequence(name, [0] * length, length))
    while chunks := scheduler.schedule():
        yield pack(chunks, layout)
        for chunk in chunks:
            scheduler.advance(chunk)
            if chunk.reaches_end and len(chunk.sequence.output) < 4:
                chunk.sequence.append(0)
            elif chunk.reaches_end:
                scheduler.remove(chunk.sequence)
