"""Weights that a checkpoint keeps in few bits, as the float32 numbers that they stand for.

Both encodings have few distinct values, so that they are looked up; the result is exact but for the one rounding of
value times factor in float8.
"""

# Shapes: n rows, I inputs, G groups of inputs.

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from moesaic.families.tensor_check import FP8_BLOCK, MXFP4_GROUP

# 4-bit floats by their code: a sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4 = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))
# What a byte stands for: two 4-bit floats, the low half's first, side by side as one 64-bit number.
_FP4_PAIRS = torch.tensor([(low, high) for high, low in product(_FP4, _FP4)]).view(torch.int64).flatten()
# A power of two by its biased exponent; the last code is no number.
_POWERS = torch.tensor([*(2.0 ** (code - 127) for code in range(255)), float("nan")])
_FP8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def dequantise_fp8_block(values: Tensor, scales: Tensor) -> Tensor:
    """values [n, I] float8 and for every row the scales [n, G] of its blocks, the last of which may be cut short, in
    any float type: [n, I] float32."""
    decoded = _look_up(_FP8, values.view(torch.uint8)).view(values.shape)
    whole = values.shape[1] // FP8_BLOCK
    blocks, rest = decoded.tensor_split([whole * FP8_BLOCK], dim=1)
    blocks.unflatten(1, (whole, FP8_BLOCK)).mul_(scales[:, :whole, None])
    rest.mul_(scales[:, whole:])
    return decoded


def dequantise_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks [n, G, 16] and the biased exponents [n, G] of their factors, both uint8: [n, 32 G] float32."""
    decoded = _look_up(_FP4_PAIRS, blocks).view(torch.float32).view(*scales.shape, MXFP4_GROUP)
    return decoded.mul_(_look_up(_POWERS, scales).view(*scales.shape, 1)).flatten(1)


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """table [256] and uint8 codes of any shape: one entry each, in one dimension."""
    return table.index_select(0, codes.flatten().int())
