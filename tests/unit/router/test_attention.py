"""Paged attention against plain attention over the whole sequence."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.families.model import Attention
from router.attention import attend
from router.batch import pack
from router.chunk import Sequence
from router.kv_cache import BlockPool, KVCache
from router.layout import Layout
from router.scheduler import Limits, Scheduler

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
) -> torch.Tensor:
    """query [T, H, d], key and value [T, G, d] -> [T, H, d], token by token."""
    rows = []
    for place in range(len(query)):
        first = max(0, place - window + 1) if window else 0
        keys = key[first : place + 1].repeat_interleave(HEADS // KV_HEADS, dim=1)
        values = value[first : place + 1].repeat_interleave(HEADS // KV_HEADS, dim=1)
        scores = torch.einsum("hd,chd->hc", query[place], keys) / math.sqrt(HEAD_DIM)
        rows.append(torch.einsum("hc,chd->hd", scores.softmax(-1), values))
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("budget", [7, 64])
@pytest.mark.parametrize("invariant", [False, True])
def test_packed_chunks_over_blocks_equal_plain_attention(
    window: int | None, budget: int, invariant: bool
) -> None:
    mixers = [Attention(HEADS, KV_HEADS, HEAD_DIM, window=window)]
    cpu = torch.device("cpu")
    layout = Layout.of(mixers, block_tokens=4, device=cpu, dtype=torch.float32, invariant=invariant)
    generator = torch.Generator().manual_seed(0)
    lengths = {"short": 3, "one": 1, "long": 19}
    inputs = {
        name: [
            torch.randn(length + 4, heads, HEAD_DIM, generator=generator)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        ]
        for name, length in lengths.items()
    }
    pool = BlockPool(16, 4)
    cache = KVCache(mixers, num_blocks=16, block_tokens=4, dtype=torch.float32, device=cpu)
    scheduler = Scheduler(Limits(budget, 8), pool)
    for name, length in lengths.items():
        scheduler.add(Sequence(name, [0] * length, length))
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in lengths}

    while chunks := scheduler.schedule():
        batch = pack(chunks, layout)
        query, key, value = (
            torch.cat([inputs[c.sequence.sequence_id][part][c.start : c.end] for c in chunks])
            for part in range(3)
        )
        cache.write(0, batch.cache_positions, torch.cat((key, value), dim=1).flatten(1))
        attended = attend(0, query, batch, cache, 1 / math.sqrt(HEAD_DIM)).view(-1, HEADS, HEAD_DIM)
        for chunk, first in zip(chunks, batch.first_rows, strict=True):
            outputs[chunk.sequence.sequence_id].append(attended[first : first + chunk.num_tokens])
            chunk.sequence.num_computed = chunk.end
            if chunk.reaches_end and len(chunk.sequence.output) < 4:
                chunk.sequence.append(0)
            elif chunk.reaches_end:
                scheduler.remove(chunk.sequence)

    for name, parts in outputs.items():
        expected = plain_attention(*inputs[name], window)
        torch.testing.assert_close(torch.cat(parts), expected, atol=1e-5, rtol=0)
