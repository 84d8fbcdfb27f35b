"""Rotary positions with the two numbers of a pair side by side, so that the rotation is one complex product.

Checkpoints keep them half a head apart, so query and key rows are reordered. Scores stay the same.

Shapes: T tokens, h heads, d head size, P positions that are served.
"""

from __future__ import annotations

import torch


def pairs_side_by_side(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorders rows [h * d, ...] of query or key weights: each head's rotary pairs become adjacent."""
    pairs: torch.Tensor = rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(rows.shape)
    return pairs


def rotary_turns(num_positions: int, head_dim: int, theta: float, *, scaling: float = 1.0) -> torch.Tensor:
    """[P, 1, d / 2] complex: cosine and sine of the angles, computed by the same operations as in
    transformers. Positions are divided by `scaling`."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    positions = torch.arange(num_positions, dtype=torch.float32) / scaling
    angles = positions[:, None] * frequencies
    return torch.complex(angles.cos(), angles.sin())[:, None]


def turn_(heads: torch.Tensor, turns: torch.Tensor) -> None:
    """Rotates heads [T, h, d] in place, computing in float32."""
    pairs = heads.view(*heads.shape[:2], -1, 2)
    if heads.dtype == torch.float32:
        torch.view_as_complex(pairs).mul_(turns)
    else:
        pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * turns))
