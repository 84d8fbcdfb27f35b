"""A router inside the test process, for looking at logits: its real model over real worker processes, through the real
dispatcher, or over the plain computation of every expert right here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from support.expert_calls import ReferenceExperts
from support.views import whole

from expert_worker.experts.expert import ExpertForm
from expert_worker.experts.loader import load_experts
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.epoch import ExpertAddress
from moesaic.errors import MoesaicError
from moesaic.families import DenseLayers, describe_model
from moesaic.routing_table import Snapshot
from moesaic.settings import DType, EngineSettings
from router.assembly import LoadedRouter, load_router
from router.attention.packed_batch import pack
from router.config import RouterConfig
from router.control.cluster_watch import NamedWorkers
from router.decoders.decoder import MicroBatch
from router.dispatch.dispatcher import DispatchStep
from router.gating.gate import NO_SLOT
from router.phase_clock import PhaseClock
from router.scheduling.block_pool import BlockPool
from router.scheduling.scheduler import Limits, Scheduler
from router.scheduling.sequence import Chunk
from router.scheduling.sequence import Sequence as ScheduledSequence
from router.workers.replica_pool import ReplicaPool


class LocalRouter:
    """Runs sequences step by step and keeps every logit."""

    def __init__(self, loaded: LoadedRouter, begin_step: Callable[[], DispatchStep]) -> None:
        self.loaded = loaded
        self.begin_step = begin_step
        self.num_preemptions = 0

    def with_blocks(self, num_blocks: int) -> LocalRouter:
        """The same with so little room in its cache that sequences are in each other's way."""
        blocks = BlockPool(num_blocks, self.loaded.blocks.block_tokens)
        return LocalRouter(replace(self.loaded, blocks=blocks), self.begin_step)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_new: int = 0,
        max_batch_tokens: int = 512,
        following: Sequence[Sequence[int]] | None = None,
    ) -> tuple[list[torch.Tensor], list[list[int]]]:
        """All prompts at once: for each, the logits [T + num_new, V] of every position, and its tokens: the greedy
        ones, or those that are to follow each prompt. Of prompts that an encoder reads, only the last position has
        logits."""
        loaded = self.loaded
        limits = Limits(max_batch_tokens, len(prompts), whole_prompts=loaded.encodes_prompts)
        scheduler = Scheduler(limits, loaded.blocks, states=loaded.states)
        open_sequences = [
            ScheduledSequence(str(index), list(prompt), len(prompt)) for index, prompt in enumerate(prompts)
        ]
        # By position: a sequence that starts over computes some of them again.
        rows: dict[str, dict[int, torch.Tensor]] = {s.sequence_id: {} for s in open_sequences}
        outputs = {s.sequence_id: s.output for s in open_sequences}
        for sequence in open_sequences:
            scheduler.add(sequence)
        while chunks := scheduler.schedule():
            batch = pack(chunks, loaded.model.layout)
            experts = self.begin_step()
            predicting = [self._predicting(chunk) for chunk in chunks]
            wanted = [
                row + first
                for first, rows_of_chunk in zip(batch.first_rows, predicting, strict=True)
                for row in rows_of_chunk
            ]
            part = MicroBatch(batch, torch.tensor(wanted), experts)
            if loaded.states is not None and loaded.cache.states is not None:
                loaded.cache.states.apply(loaded.states.take_copies())
            logits = loaded.model.forward((part,), loaded.cache)
            assert not experts.failed, experts.failed
            parted = logits.split([len(own) for own in predicting])
            for chunk, own, its_rows in zip(chunks, parted, predicting, strict=True):
                sequence = chunk.sequence
                rows[sequence.sequence_id] |= {
                    chunk.start + row: logit for row, logit in zip(its_rows, own, strict=True)
                }
                ends = chunk.reaches_end
                scheduler.advance(chunk)
                if ends and len(sequence.output) < num_new:
                    given = None if following is None else following[int(sequence.sequence_id)]
                    sequence.append(int(own[-1].argmax()) if given is None else given[len(sequence.output)])
                elif ends:
                    scheduler.remove(sequence)
        self.num_preemptions += scheduler.num_preemptions
        return [torch.stack(list(r.values())) for r in rows.values()], list(outputs.values())

    def _predicting(self, chunk: Chunk) -> range:
        """Rows of a chunk that have logits."""
        first = chunk.sequence.num_prompt_tokens - 1 if self.loaded.encodes_prompts else 0
        return range(max(0, first - chunk.start), chunk.num_tokens)


@contextmanager
def local_router(
    model: Path, addresses: Sequence[str], *, dense_layers: DenseLayers = "auto", **engine: Any
) -> Iterator[LocalRouter]:
    """A router of this process over the workers at `addresses`, with these settings of the engine."""
    experts = describe_model(open_checkpoint(model), dense_layers).addresses
    view = NamedWorkers(addresses, model=model.name, experts=experts)
    snapshot = asyncio.run(_first(view))
    assert snapshot.epoch is not None, "the workers do not hold every expert"
    epoch, pool = snapshot.epoch, ReplicaPool()
    pool.update(snapshot.table)
    loaded = load_router(router_config(model, dense_layers, **engine), pool, PhaseClock())
    try:
        yield LocalRouter(
            loaded, lambda: loaded.dispatcher.begin(whole(epoch), deadline_s=time.monotonic() + 60)
        )
    finally:
        pool.close()


def lonely_router(
    model: Path, *, dense_layers: DenseLayers = "auto", dtype: DType = "float32", **engine: Any
) -> LocalRouter:
    """A router of this process whose experts are computed here, one by one: plainly, or in bfloat16 as a worker does."""
    experts = (ReferenceExperts if dtype == "float32" else WorkerExperts)(model, dense_layers)
    config = replace(router_config(model, dense_layers, **engine), dtype=dtype)
    loaded = load_router(config, ReplicaPool(), PhaseClock())
    return LocalRouter(loaded, lambda: cast(DispatchStep, ReferenceStep(experts)))


def router_config(model: Path, dense_layers: DenseLayers, **engine: Any) -> RouterConfig:
    return RouterConfig(
        model=model,
        served_name=model.name,
        host="127.0.0.1",
        port=0,
        device="cpu",
        dtype="float32",
        engine=EngineSettings(**{"threads": 1, **engine}),
        dense_layers=dense_layers,
    )


class WorkerExperts:
    """All experts of a checkpoint in bfloat16, as a worker holds and computes them."""

    def __init__(self, folder: Path, dense_layers: DenseLayers) -> None:
        checkpoint = open_checkpoint(folder)
        model = describe_model(checkpoint, dense_layers)
        form = ExpertForm(torch.device("cpu"), torch.bfloat16)
        self._held = dict(load_experts(checkpoint, model, model.addresses, form))

    def expert(self, layer: int, slot: int, x: torch.Tensor) -> torch.Tensor:
        return self._held[ExpertAddress(layer, slot)].expert(x)


class ReferenceStep:
    """A DispatchStep that asks nobody."""

    def __init__(self, experts: ReferenceExperts | WorkerExperts) -> None:
        self.failed: dict[int, MoesaicError] = {}
        self._experts = experts

    def send(
        self,
        layer: int,
        hidden: torch.Tensor,
        slots: torch.Tensor,
        weights: torch.Tensor,
        *,
        tokens: Sequence[int] | None = None,
    ) -> torch.Tensor:
        output = torch.zeros(hidden.shape)
        for slot in set(slots.unique().tolist()) - {NO_SLOT}:
            rows, ranks = torch.where(slots == slot)
            answers = self._experts.expert(layer, slot, hidden[rows])
            output.index_add_(0, rows, answers * weights[rows, ranks, None])
        return output.to(hidden.dtype)

    def receive(self, call: torch.Tensor) -> torch.Tensor:
        return call

    def finish(self) -> None:
        pass


async def _first(view: NamedWorkers) -> Snapshot:
    async for snapshot in view.watch():
        return snapshot
    raise AssertionError("a view never ends")
