"""Weights that a checkpoint keeps in few bits, decoded to the float32 numbers that they stand for.

Both encodings have few distinct values, which are looked up. The result is exact except for one rounding, of
value times scale, in float8.

Shapes: n rows, I inputs, G groups of inputs, B blocks of rows.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from moesaic.families.tensor_check import FP8_BLOCK, MXFP4_GROUP

# The 4-bit floats by their code: a sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4 = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))
# The two 4-bit floats of a byte, that of the low half first, side by side as one 64-bit number.
_FP4_PAIRS = torch.tensor([(low, high) for high, low in product(_FP4, _FP4)]).view(torch.int64).flatten()
# The powers of two by their biased exponent; the last code is not a number.
_POWERS = torch.tensor([*(2.0 ** (code - 127) for code in range(255)), float("nan")])
_FP8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def dequantise_fp8_block(values: Tensor, scales: Tensor) -> Tensor:
    """[n, I] float32, from float8 values [n, I] and each row's scales [n, G] in any float dtype.

    The last block of a row may be cut short.
    """
    decoded = _look_up(_FP8, values.view(torch.uint8)).view(values.shape)
    whole = values.shape[1] // FP8_BLOCK
    blocks, rest = decoded.tensor_split([whole * FP8_BLOCK], dim=1)
    blocks.unflatten(1, (whole, FP8_BLOCK)).mul_(scales[:, :whole, None])
    rest.mul_(scales[:, whole:])
    return decoded


def fp8_row_scales(scales: Tensor, first_row: int, num_rows: int) -> Tensor:
    """The scales [n, G] of the rows from `first_row` on, from [B, G] with one row per block of rows."""
    return scales.index_select(0, torch.arange(first_row, first_row + num_rows) // FP8_BLOCK)


def dequantise_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """[n, 32 G] float32, from uint8 blocks [n, G, 16] and the biased exponents [n, G] of their scales."""
    decoded = _look_up(_FP4_PAIRS, blocks).view(torch.float32).view(*scales.shape, MXFP4_GROUP)
    return decoded.mul_(_look_up(_POWERS, scales).view(*scales.shape, 1)).flatten(1)


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """The entry of table [256] for each of the uint8 codes, which may have any shape, in one dimension."""
    return table.index_select(0, codes.flatten().int())
