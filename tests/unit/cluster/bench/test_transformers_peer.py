"""What a batch in transformers becomes, with a program that answers as the real one does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cluster.bench.transformers_peer import PlainBatch, transformers_peer
from cluster.bench.workload import LoadRequest
from moesaic.errors import Unavailable

# Two sequences: a second for the prompts, half a second for each later token.
FAKE = """
import json, sys
print("{}", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["num_tokens"] > 9:
        break
    print(json.dumps({
        "prefill_s": 1.0,
        "decode_s": 0.5 * (asked["num_tokens"] - 1),
        "token_ids": [[7] * asked["num_tokens"] for _ in asked["prompts"]],
        "reading": "eager, dynamic cache",
        "decoding": "grouped_mm, static cache",
        "trials": {"reading_s": {"eager, dynamic cache": 0.1}, "decoding_s": {}},
    }), flush=True)
"""


@pytest.fixture
def command(tmp_path: Path) -> tuple[str, ...]:
    program = tmp_path / "program.py"
    program.write_text(FAKE)
    return (sys.executable, str(program))


def requests(output_tokens: int) -> list[LoadRequest]:
    return [LoadRequest((1, 2, 3), output_tokens) for _ in range(2)]


async def test_a_batch_has_the_rates_of_its_times(command: tuple[str, ...]) -> None:
    async with transformers_peer(command) as peer:
        batch = await peer.run(requests(5))
    assert batch.token_ids == ((7,) * 5,) * 2
    assert (batch.summary.prefill_s, batch.summary.decode_tokens_per_s) == (1.0, 4.0)
    assert batch.summary.output_tokens_per_s == pytest.approx(10 / 3)
    assert batch.reading_trials_s == {"eager, dynamic cache": 0.1}


async def test_one_token_has_no_decode_rate(command: tuple[str, ...]) -> None:
    async with transformers_peer(command) as peer:
        assert (await peer.run(requests(1))).summary.decode_tokens_per_s is None


async def test_a_program_that_ends_is_unavailable(command: tuple[str, ...]) -> None:
    async with transformers_peer(command) as peer:
        with pytest.raises(Unavailable, match="transformers could not run this model"):
            await peer.run(requests(10))


async def test_only_a_static_cache_is_named_beside_the_experts(command: tuple[str, ...]) -> None:
    async with transformers_peer(command) as peer:
        batch: PlainBatch = await peer.run(requests(5))
    assert batch.experts == "eager / grouped_mm, static cache"
