"""An expert worker whose experts return their rows: the product's service and batcher without computing.

It prints `ready HOST:PORT` and runs until its standard input ends. It holds the slots FIRST to LAST - 1 of
one layer; the version of a slot is `identity_version(slot)`.

Run by transport.py: python benchmarks/peers/identity_worker.py NAME HIDDEN FIRST LAST
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from expert_worker.compute.batcher import Batcher
from expert_worker.compute.call import ExpertCall
from expert_worker.experts.expert import Expert
from expert_worker.experts.store import ExpertStore, HeldExpert
from expert_worker.serving.service import ExpertService, LoadedModel
from moesaic import rpc
from moesaic.epoch import ExpertAddress
from moesaic.errors import MoesaicError
from moesaic.families import MoeModel

MAX_ROWS = 16384


def identity_version(slot: int) -> bytes:
    return slot.to_bytes(2, "big") * 16


def return_rows(calls: Sequence[ExpertCall]) -> list[Tensor | MoesaicError]:
    return [_weigh(call) if call.combine_sum else _repeat(call) for call in calls]


def _repeat(call: ExpertCall) -> Tensor:
    return call.hidden.index_select(0, call.rows)


def _weigh(call: ExpertCall) -> Tensor:
    assert call.weights is not None
    weights = torch.zeros(len(call.hidden)).index_add_(0, call.rows, call.weights)
    return (call.hidden * weights[:, None]).to(call.hidden.dtype)


async def main(name: str, hidden: int, first: int, last: int) -> None:
    service = ExpertService(
        worker=name,
        incarnation=f"{name}-1",
        max_call_rows=MAX_ROWS,
        max_stream_calls=64,
        shared_memory=True,
        direct_host="127.0.0.1",
    )
    batcher = Batcher(return_rows, max_queued_calls=64, max_pass_rows=MAX_ROWS)
    store = ExpertStore()
    expert = cast(Expert, object())  # return_rows does not use it.
    for slot in range(first, last):
        store.add(ExpertAddress(0, slot), HeldExpert(identity_version(slot), expert))
    server = rpc.Server({rpc.EXPERT_SERVICE: service.add_to}, max_message_bytes=rpc.DATA_MESSAGE_BYTES)
    port = await server.start("127.0.0.1", 0)
    batcher.start()
    model = cast(MoeModel, SimpleNamespace(experts={0: None}, hidden_size=hidden))
    service.serve(LoadedModel("identity", model, "cpu", store, batcher, lambda: 0))
    await server.set_serving(True)
    print(f"ready 127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await batcher.stop(5.0)
    service.close()
    await server.stop(1.0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:5])))
