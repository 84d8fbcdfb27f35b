"""A router inside the test process, for looking at logits: its real model and dispatcher over real worker processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint import open_checkpoint
from moesaic.families import describe_model
from moesaic.manifest import Epoch
from moesaic.settings import EngineSettings
from router.batch import pack
from router.chunk import Sequence as ScheduledSequence
from router.cluster_view import NamedWorkers, Snapshot
from router.config import RouterConfig
from router.model import MicroBatch
from router.parts import Parts, load_parts
from router.phases import PhaseClock
from router.replica_pool import ReplicaPool
from router.scheduler import Limits, Scheduler


class LocalRouter:
    """Runs sequences step by step and keeps every logit."""

    def __init__(self, parts: Parts, epoch: Epoch) -> None:
        self._parts = parts
        self._epoch = epoch

    def run(
        self, prompts: Sequence[Sequence[int]], *, num_new: int = 0, max_batch_tokens: int = 512
    ) -> tuple[list[torch.Tensor], list[list[int]]]:
        """All prompts at once: for each, the logits [T + num_new, V] of every position and its greedy tokens."""
        parts = self._parts
        scheduler = Scheduler(Limits(max_batch_tokens, len(prompts)), parts.blocks)
        open_sequences = [
            ScheduledSequence(str(index), list(prompt), len(prompt)) for index, prompt in enumerate(prompts)
        ]
        rows: dict[str, list[torch.Tensor]] = {s.sequence_id: [] for s in open_sequences}
        outputs = {s.sequence_id: s.output for s in open_sequences}
        for sequence in open_sequences:
            scheduler.add(sequence)
        while chunks := scheduler.schedule():
            batch = pack(chunks, parts.model.layout)
            experts = parts.dispatcher.begin(self._epoch, deadline_s=time.monotonic() + 30)
            part = MicroBatch(batch, torch.arange(batch.num_tokens), experts)
            logits = parts.model.forward((part,), parts.cache)
            assert not experts.failed, experts.failed
            for chunk, first in zip(chunks, batch.first_rows, strict=True):
                sequence = chunk.sequence
                own = logits[first : first + chunk.num_tokens]
                rows[sequence.sequence_id] += own
                ends = chunk.reaches_end
                scheduler.advance(chunk)
                if ends and len(sequence.output) < num_new:
                    sequence.append(int(own[-1].argmax()))
                elif ends:
                    scheduler.remove(sequence)
        return [torch.stack(r) for r in rows.values()], list(outputs.values())


@contextmanager
def local_router(model: Path, addresses: Sequence[str], **engine: Any) -> Iterator[LocalRouter]:
    """A router of this process over the workers at `addresses`, with these settings of the engine."""
    shape = describe_model(open_checkpoint(model))
    view = NamedWorkers(addresses, model=model.name, num_layers=shape.num_layers, num_slots=shape.num_slots)
    snapshot = asyncio.run(_first(view))
    assert snapshot.epoch is not None, "the workers do not hold every expert"
    pool = ReplicaPool()
    pool.update(snapshot.table)
    config = RouterConfig(
        model=model,
        served_name=model.name,
        host="127.0.0.1",
        port=0,
        device="cpu",
        dtype="float32",
        engine=EngineSettings(**{"threads": 1, **engine}),
    )
    try:
        yield LocalRouter(load_parts(config, pool, PhaseClock()), snapshot.epoch)
    finally:
        pool.close()


async def _first(view: NamedWorkers) -> Snapshot:
    async for snapshot in view.watch():
        return snapshot
    raise AssertionError("a view never ends")
