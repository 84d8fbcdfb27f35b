"""What the cache keeps of a token in each kind of layer, and that it reads the same wherever blocks lie."""

from __future__ import annotations

import pytest
import torch

from moesaic.families.model import Attention, Hyena, LatentAttention
from router.cache.kv_cache import Contexts, KVCache

GROUPED = Attention(num_heads=8, num_kv_heads=2, head_dim=6)
LATENT = LatentAttention(num_heads=8, latent_dim=10, rotary_dim=4, key_dim=16, value_dim=16)
HYENA = Hyena(state_size=2, short_filter=3, num_heads=4)
BLOCK_TOKENS = 4


def make_cache() -> KVCache:
    return KVCache(
        [GROUPED, HYENA, LATENT],
        num_blocks=8,
        block_tokens=BLOCK_TOKENS,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def test_a_token_takes_what_the_mixer_of_each_layer_needs() -> None:
    grouped, latent = 2 * 2 * 6, 10 + 4
    assert KVCache.token_bytes([GROUPED], torch.float32) == grouped * 4
    assert KVCache.token_bytes([LATENT], torch.bfloat16) == latent * 2
    assert KVCache.token_bytes([HYENA], torch.bfloat16) == 0
    mixers = [GROUPED, HYENA, LATENT, GROUPED]
    assert KVCache.token_bytes(mixers, torch.bfloat16) == (2 * grouped + latent) * 2


def test_a_layer_with_a_recurrent_state_has_no_rows() -> None:
    with pytest.raises(KeyError):
        make_cache().write(1, torch.tensor([0]), torch.zeros(1, 24))


@pytest.mark.parametrize("blocks", [[2, 3, 4], [5, 0, 3]])
def test_keys_and_values_come_back_from_blocks_in_a_row_and_from_others(blocks: list[int]) -> None:
    cache, rows = make_cache(), torch.randn(12, 24)
    cache.write(0, positions(blocks), rows)
    keys, values = cache.read(0, contexts(blocks), slice(1, 11))
    expected = rows.view(12, 2, 2, 6)[1:11].permute(1, 2, 0, 3)
    assert torch.equal(keys, expected[:1])
    assert torch.equal(values, expected[1:])


@pytest.mark.parametrize("blocks", [[2, 3, 4], [5, 0, 3]])
def test_one_compressed_vector_is_keys_and_values_of_all_heads(blocks: list[int]) -> None:
    cache, rows = make_cache(), torch.randn(12, 14)
    cache.write(2, positions(blocks), rows)
    keys, values = cache.read(2, contexts(blocks), slice(1, 11))
    assert torch.equal(keys, rows[None, None, 1:11])
    assert values.data_ptr() == keys.data_ptr()


def test_contexts_of_several_sequences_are_read_together() -> None:
    cache, rows = make_cache(), torch.randn(16, 24)
    blocks = [5, 0, 3, 7]
    cache.write(0, positions(blocks), rows)
    keys, _ = cache.read(0, Contexts(2, 2, torch.tensor(blocks)), slice(0, 8))
    assert torch.equal(keys, rows.view(2, 8, 2, 2, 6)[:, :, 0].transpose(1, 2))


def positions(blocks: list[int]) -> torch.Tensor:
    places = torch.arange(len(blocks) * BLOCK_TOKENS)
    return torch.tensor(blocks)[places // BLOCK_TOKENS] * BLOCK_TOKENS + places % BLOCK_TOKENS


def contexts(blocks: list[int]) -> Contexts:
    """As a batch names them: those in a row by the first."""
    if blocks == list(range(blocks[0], blocks[0] + len(blocks))):
        return Contexts(1, len(blocks), blocks[0])
    return Contexts(1, len(blocks), torch.tensor(blocks))
