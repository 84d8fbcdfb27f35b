"""Whoever asks for much does not keep the others waiting."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from support.checkpoints import write_mixtral
from support.processes import running_router, running_workers

from moesaic import rpc
from moesaic.client import Client
from moesaic.v1 import inference_pb2, inference_pb2_grpc

WAIT_S = 60.0
NUM_PLACES = 8


async def test_a_call_that_fills_every_place_gives_some_to_others_and_loses_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESAIC_ENGINE__MAX_RUNNING_SEQUENCES", str(NUM_PLACES))
    model = write_mixtral(tmp_path / "tiny")
    with running_workers(model, ["all"]) as workers, running_router(model, workers) as router:
        async with Client(router.address) as client, rpc.aio_channel(router.address) as channel:
            begun = asyncio.Event()
            num_tokens: Counter[int] = Counter()

            async def ask_for_much() -> None:
                async for token in client.generate(
                    [5, 17, 42], n=NUM_PLACES, max_tokens=240, ignore_eos=True, timeout_s=WAIT_S
                ):
                    num_tokens[token.index] += len(token.token_ids)
                    if len(num_tokens) == NUM_PLACES:
                        begun.set()

            greedy = asyncio.create_task(ask_for_much())
            async with asyncio.timeout(WAIT_S):
                await begun.wait()
                singles = [client.complete([90 + i], max_tokens=8, timeout_s=WAIT_S) for i in range(3)]
                await asyncio.gather(*singles)
                assert not greedy.done() and max(num_tokens.values()) < 240
                await greedy
            assert num_tokens == Counter(dict.fromkeys(range(NUM_PLACES), 240))
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            stats = await stub.GetRouterStats(inference_pb2.GetRouterStatsRequest(), timeout=WAIT_S)
            assert stats.preemptions > 0 and stats.running_sequences == stats.waiting_sequences == 0
