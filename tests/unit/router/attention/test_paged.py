"""Paged attention against plain attention over the whole sequence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.packed_batches import packed_batches
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.families.model import Attention, Hyena, Mixer
from router.attention.packed_batch import PackedBatch, pack
from router.attention.paged import attend, softmax_beside_sinks
from router.attention.views import AttentionLayout
from router.cache.kv_cache import KVCache
from router.scheduling.block_pool import BlockPool
from router.scheduling.sequence import Chunk, Sequence

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
SCALING = 1 / math.sqrt(HEAD_DIM)
CPU = torch.device("cpu")

QueriesKeysValues = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def first_seen(place: int, mixer: Attention) -> int:
    first = 0 if mixer.window is None else max(0, place - mixer.window + 1)
    return first if mixer.chunk is None else max(first, place // mixer.chunk * mixer.chunk)


def plain_row(
    place: int, inputs: QueriesKeysValues, mixer: Attention, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """What the token at `place` gets: query [T, H, d], key and value [T, G, d] -> [H, d]."""
    query, key, value = inputs
    shared = mixer.num_heads // mixer.num_kv_heads
    first = first_seen(place, mixer)
    keys = key[first : place + 1].repeat_interleave(shared, dim=1)
    values = value[first : place + 1].repeat_interleave(shared, dim=1)
    scores = torch.einsum("hd,chd->hc", query[place], keys) / math.sqrt(mixer.head_dim)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None]), dim=1)
    return torch.einsum("hc,chd->hd", scores.softmax(-1)[:, : len(keys)], values)


def plain_attention(
    inputs: QueriesKeysValues, mixer: Attention, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """[T, H, d], token by token."""
    return torch.stack([plain_row(place, inputs, mixer, sinks) for place in range(len(inputs[0]))])


def random_inputs(num_tokens: int, mixer: Attention, seed: int = 0) -> QueriesKeysValues:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(num_tokens, heads, mixer.head_dim, generator=generator)
        for heads in (mixer.num_heads, mixer.num_kv_heads, mixer.num_kv_heads)
    )
    return query, key, value


def write_and_attend(
    layer: int,
    batch: PackedBatch,
    inputs: dict[str, QueriesKeysValues],
    cache: KVCache,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, H, d] of the batch's rows."""
    query, key, value = (
        torch.cat([inputs[c.sequence.sequence_id][part][c.start : c.end] for c in batch.chunks])
        for part in range(3)
    )
    cache.write(layer, batch.cache_positions, torch.cat((key, value), dim=1).flatten(1))
    scaling = 1 / math.sqrt(query.shape[-1])
    return attend(layer, query, batch, cache, scaling, sinks).view(query.shape)


def run(
    mixers: list[Mixer],
    lengths: dict[str, int],
    *,
    budget: int,
    invariant: bool = False,
    dtype: torch.dtype = torch.float32,
    sinks: torch.Tensor | None = None,
) -> tuple[dict[int, dict[str, QueriesKeysValues]], dict[int, dict[str, torch.Tensor]]]:
    """Inputs and outputs of every layer that attends, by sequence."""
    layout = AttentionLayout.of(mixers, block_tokens=4, device=CPU, dtype=dtype, invariant=invariant)
    num_blocks = sum(-(-(length + 4) // 4) for length in lengths.values())
    cache = KVCache(mixers, num_blocks=num_blocks, block_tokens=4, dtype=dtype, device=CPU)
    attending = {layer: mixer for layer, mixer in enumerate(mixers) if isinstance(mixer, Attention)}
    inputs: dict[int, dict[str, Any]] = {
        layer: {
            name: tuple(part.to(dtype) for part in random_inputs(length + 4, mixer, seed=layer))
            for name, length in lengths.items()
        }
        for layer, mixer in attending.items()
    }
    parts: dict[int, dict[str, list[torch.Tensor]]] = {
        layer: {name: [] for name in lengths} for layer in attending
    }
    for batch in packed_batches(lengths, layout, BlockPool(num_blocks, 4), budget):
        for layer, outputs in parts.items():
            attended = write_and_attend(layer, batch, inputs[layer], cache, sinks)
            for chunk, first in zip(batch.chunks, batch.first_rows, strict=True):
                outputs[chunk.sequence.sequence_id].append(attended[first : first + chunk.num_tokens])
    return inputs, {
        layer: {name: torch.cat(rows) for name, rows in outputs.items()} for layer, outputs in parts.items()
    }


VIEWS: dict[str, dict[str, int]] = {
    "all": {},
    "window 1": {"window": 1},
    "window 5": {"window": 5},
    "window 90": {"window": 90},
    "chunk 1": {"chunk": 1},
    "chunk 6": {"chunk": 6},
    "chunk 70": {"chunk": 70},
    "chunk 128": {"chunk": 128},
    "window 5 in chunk 70": {"window": 5, "chunk": 70},
    "window 69 in chunk 70": {"window": 69, "chunk": 70},
}


def view(name: str, **others: Any) -> Attention:
    return Attention(HEADS, KV_HEADS, HEAD_DIM, **VIEWS[name], **others)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("budget", [7, 64])
@pytest.mark.parametrize("invariant", [False, True])
def test_packed_chunks_over_blocks_equal_plain_attention(name: str, budget: int, invariant: bool) -> None:
    mixer = view(name)
    inputs, outputs = run([mixer], {"short": 3, "one": 1, "long": 19}, budget=budget, invariant=invariant)
    for sequence, attended in outputs[0].items():
        expected = plain_attention(inputs[0][sequence], mixer)
        torch.testing.assert_close(attended, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("invariant", [False, True])
def test_prompts_of_several_calls_equal_plain_attention(name: str, invariant: bool) -> None:
    mixer = view(name)
    inputs, outputs = run([mixer], {"a": 300, "b": 210, "c": 97}, budget=333, invariant=invariant)
    for sequence, attended in outputs[0].items():
        expected = plain_attention(inputs[0][sequence], mixer)
        torch.testing.assert_close(attended, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("invariant", [False, True])
def test_layers_of_one_model_may_see_differently_and_have_heads_of_their_own(invariant: bool) -> None:
    hyena = Hyena(state_size=2, short_filter=3, num_heads=4)
    small = Attention(4, 4, 12, window=5)
    mixers = [view("all"), small, hyena, view("chunk 6"), view("all")]
    inputs, outputs = run(mixers, {"short": 3, "one": 1, "long": 19}, budget=9, invariant=invariant)
    assert list(outputs) == [0, 1, 3, 4]
    for layer, by_sequence in outputs.items():
        mixer = mixers[layer]
        assert isinstance(mixer, Attention)
        for sequence, attended in by_sequence.items():
            expected = plain_attention(inputs[layer][sequence], mixer)
            torch.testing.assert_close(attended, expected, atol=1e-5, rtol=0)


def test_layers_that_see_alike_share_what_is_laid_out() -> None:
    mixers = [view("all"), view("window 5"), view("all", sinks=True), view("window 5")]
    layout = AttentionLayout.of(mixers, block_tokens=4, device=CPU, dtype=torch.float32)
    sequence = Sequence("a", [0] * 9, 9, blocks=[0, 1, 2])
    batch = pack((Chunk(sequence, 0, 9),), layout)
    assert len(batch.plans) == 2
    assert batch.plan(0) is batch.plan(2)
    assert batch.plan(1) is batch.plan(3)
    assert batch.plan(0) is not batch.plan(1)


@pytest.mark.parametrize("name", ["all", "window 90", "chunk 70"])
@pytest.mark.parametrize("budget", [7, 333])
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sink_takes_part_in_the_softmax_and_adds_nothing(
    name: str, budget: int, invariant: bool, dtype: torch.dtype
) -> None:
    mixer = view(name, sinks=True)
    sinks = torch.tensor([-30.0, -1.0, 0.0, 1.5, 4.0, 30.0]).to(dtype)
    lengths = {"a": 150, "b": 1, "c": 97}
    inputs, outputs = run([mixer], lengths, budget=budget, invariant=invariant, dtype=dtype, sinks=sinks)
    for sequence, attended in outputs[0].items():
        query, key, value = (part.float() for part in inputs[0][sequence])
        expected = plain_attention((query, key, value), mixer, sinks.float())
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(attended.float(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("masked", ["decode", "prefill", "causal"])
@pytest.mark.parametrize("most_scores", [1, 1 << 27])
def test_sinks_give_the_same_on_devices_without_the_kernel(
    monkeypatch: pytest.MonkeyPatch, masked: str, most_scores: int
) -> None:
    monkeypatch.setattr("router.attention.paged._MOST_SCORES", most_scores)
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(3, 2, n, 8, generator=generator) for n in (5, 9, 9))
    sinks = torch.randn(3, 2, 1, generator=generator)
    mask = None
    seen = torch.rand(3, 1, 1, 9, generator=generator) < 0.7
    if masked == "decode":
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    elif masked == "prefill":
        mask = torch.zeros(5, 9).masked_fill(~seen[0, 0], -torch.inf)
    else:
        keys, values = keys[:, :, :5], values[:, :, :5]
    given = softmax_beside_sinks(queries, keys, values, mask, masked == "causal", 0.3, sinks)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attended, log_sums = kernel(
        queries, keys, values, is_causal=masked == "causal", attn_mask=mask, scale=0.3
    )
    expected = attended * torch.sigmoid(log_sums - sinks)[..., None]
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_batch_invariant_attention_gives_the_same_bits_however_prompts_are_cut(
    name: str, dtype: torch.dtype, with_sinks: bool
) -> None:
    sinks = torch.linspace(-2, 2, HEADS) if with_sinks else None
    alone, beside = {"a": 200}, {"b": 33, "a": 200, "c": 90}
    results = [
        run([view(name)], lengths, budget=budget, invariant=True, dtype=dtype, sinks=sinks)[1][0]["a"]
        for lengths, budget in ((alone, 512), (alone, 1), (alone, 7), (beside, 100))
    ]
    for result in results[1:]:
        assert torch.equal(result, results[0])


LONG = 32768
LONG_CHUNK = 512
LONG_BLOCK = 16


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest memory that any operation gave back."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("window", [None, 4096])
@pytest.mark.parametrize("in_a_row", [True, False])
def test_a_prompt_of_32k_is_read_in_chunks_with_bounded_memory(window: int | None, in_a_row: bool) -> None:
    mixer = Attention(num_heads=2, num_kv_heads=1, head_dim=8, window=window)
    layout = AttentionLayout.of([mixer], block_tokens=LONG_BLOCK, device=CPU, dtype=torch.float32)
    blocks = list(range(LONG // LONG_BLOCK + 1))
    cache = KVCache([mixer], num_blocks=len(blocks), block_tokens=LONG_BLOCK, dtype=torch.float32, device=CPU)
    inputs = random_inputs(LONG + 1, mixer)
    sequence = Sequence("a", [0] * (LONG + 1), LONG, blocks=blocks if in_a_row else blocks[::-1])
    sampled = (0, 1, 127, 128, 511, 512, 4095, 4096, 4097, 20000, LONG - 1, LONG)
    attended: dict[int, torch.Tensor] = {}
    with LargestTensor() as largest:
        for start in (*range(0, LONG, LONG_CHUNK), LONG):
            chunk = Chunk(sequence, start, min(LONG_CHUNK, LONG + 1 - start))
            rows = write_and_attend(0, pack((chunk,), layout), {"a": inputs}, cache)
            attended |= {place: rows[place - start] for place in sampled if start <= place < chunk.end}
    for place in sampled:
        expected = plain_row(place, inputs, mixer)
        torch.testing.assert_close(attended[place], expected, atol=1e-5, rtol=0)
    most_seen = LONG if window is None else window
    queries_of_a_call = 128
    assert largest.num_bytes <= queries_of_a_call * (most_seen + LONG_CHUNK) * 4


def test_a_token_that_decodes_reads_no_block_that_its_window_has_left() -> None:
    mixers = [Attention(2, 1, 8, window=4096), Attention(2, 1, 8, chunk=8192)]
    layout = AttentionLayout.of(mixers, block_tokens=LONG_BLOCK, device=CPU, dtype=torch.float32)
    sequence = Sequence("a", [0] * LONG, LONG, blocks=list(range(LONG // LONG_BLOCK)))
    batch = pack((Chunk(sequence, 3 * 8192 + 100, 1),), layout)
    (in_window,), (in_chunk,) = (batch.plan(layer).decode for layer in range(2))
    assert in_window.contexts.num_blocks == 4096 // LONG_BLOCK + 1
    assert in_chunk.contexts.num_blocks == 101 // LONG_BLOCK + 1
