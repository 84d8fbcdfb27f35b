"""Positions of encoder-decoders: the very numbers of transformers."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSinusoidalPositionalEmbedding
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersAttention

from moesaic.families.encoder_decoder import RelativePositions
from router.decoders.encoder_decoder.positions import (
    bias_of_distances,
    bias_of_queries,
    buckets,
    prompt_positions,
    sinusoids,
)


@settings(deadline=None)
@given(
    num_buckets=st.sampled_from([4, 8, 16, 32, 64]),
    further=st.integers(1, 200),
    both_ways=st.booleans(),
)
def test_every_distance_is_in_the_bucket_of_transformers(
    num_buckets: int, further: int, both_ways: bool
) -> None:
    relative = RelativePositions(num_buckets, num_buckets // 2 + further)
    distances = torch.arange(-600 if both_ways else 0, 600)
    # There a key before its query has a negative distance.
    expected = SwitchTransformersAttention._relative_position_bucket(
        distances if both_ways else -distances, both_ways, num_buckets, relative.max_distance
    )
    assert torch.equal(buckets(distances, relative, both_ways=both_ways), expected)


@pytest.mark.parametrize("queries", [slice(0, 5), slice(2, 4), slice(4, 5)])
def test_the_bias_of_a_query_is_that_of_its_distance_to_every_key(queries: slice) -> None:
    weight = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    relative = RelativePositions(8, 20)
    bias = bias_of_distances(weight, relative, 9, both_ways=True)
    found = bias_of_queries(bias, queries, 5)
    for row, query in enumerate(range(queries.start, queries.stop)):
        for key in range(5):
            bucket = int(buckets(torch.tensor([key - query]), relative, both_ways=True))
            assert torch.equal(found[:, row, key], weight[bucket])


@pytest.mark.parametrize("padding", [0, 1, 7])
def test_a_prompt_has_the_sines_and_cosines_of_transformers(padding: int) -> None:
    reference = NllbMoeSinusoidalPositionalEmbedding(30, 16, padding)
    first, second = torch.tensor([5, 6, padding, 9, 9, padding]), torch.tensor([padding, 3])
    table = sinusoids(torch.arange(padding, padding + 20), 16)
    table[0] = 0
    found = table[prompt_positions(torch.cat([first, second]), [6, 2], padding)]
    expected = torch.cat([reference(ids[None])[0] for ids in (first, second)])
    assert torch.equal(found, expected)
