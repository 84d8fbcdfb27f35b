"""The positions of encoder-decoders: a bias that each head has learned for distances, or sines and cosines.

Shapes: H heads, P positions that can be served, D hidden size, T tokens, Q queries, n tokens of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from moesaic.families.encoder_decoder import RelativePositions


def bias_of_distances(
    weight: torch.Tensor, relative: RelativePositions, num_positions: int, *, both_ways: bool
) -> torch.Tensor:
    """weight [buckets, H] -> what each head adds to a score: [H, 2 P - 1] for keys from P - 1 positions before to P - 1
    positions after their query, or [H, P] for keys up to P - 1 positions before it."""
    distances = torch.arange(1 - num_positions if both_ways else 0, num_positions)
    return weight.t()[:, buckets(distances, relative, both_ways=both_ways).to(weight.device)].contiguous()


def buckets(distances: torch.Tensor, relative: RelativePositions, *, both_ways: bool) -> torch.Tensor:
    """The bucket of each distance, from zero. Both ways: keys after the query have the upper half of the buckets."""
    num_buckets = relative.num_buckets
    first = torch.zeros_like(distances)
    if both_ways:
        num_buckets //= 2
        first = torch.where(distances > 0, num_buckets, 0)
        distances = distances.abs()
    num_exact = num_buckets // 2
    # These are the exact operations of transformers: at the edge of a bucket the last bit decides.
    logarithms = torch.log(distances.clamp(min=1).float() / num_exact)
    wide = logarithms / math.log(relative.max_distance / num_exact) * (num_buckets - num_exact)
    far = (num_exact + wide.to(torch.long)).clamp(max=num_buckets - 1)
    return first + torch.where(distances < num_exact, distances, far)


def bias_of_queries(bias: torch.Tensor, queries: slice, num_keys: int) -> torch.Tensor:
    """bias [H, 2 P - 1] -> [H, Q, n], for some queries of a prompt and all of its keys."""
    num_positions = (bias.shape[1] + 1) // 2
    first = num_positions - queries.stop
    wanted = bias[:, first : first + num_keys + queries.stop - queries.start - 1]
    # From one query to the next, every distance shrinks by one.
    return wanted.unfold(1, num_keys, 1).flip(1)


def sinusoids(positions: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """[P, D]: sines, then cosines, of frequencies from 1 down to 1 / 10000."""
    half = hidden_size // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def prompt_positions(token_ids: torch.Tensor, lengths: Sequence[int], padding_token: int) -> torch.Tensor:
    """token_ids [T] of prompts of these lengths -> the position of each token in its prompt, from 1. Padding has position
    0 and is not counted."""
    counted = token_ids != padding_token
    return torch.cat([of_prompt.cumsum(0) * of_prompt for of_prompt in counted.split(list(lengths))])
