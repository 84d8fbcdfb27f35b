"""Every code of an encoding stands for the number that it should, to the last bit."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moesaic.compute.dequantise import dequantise_fp8_block, dequantise_mxfp4

MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_every_byte_of_mxfp4_is_two_numbers_with_the_low_half_first() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    scales = torch.full((1, 16), 127, dtype=torch.uint8)
    expected = [
        (-1 if code & 8 else 1) * MAGNITUDES[code & 7]
        for byte in range(256)
        for code in (byte & 15, byte >> 4)
    ]
    assert dequantise_mxfp4(blocks, scales)[0].tolist() == expected


def test_every_exponent_of_mxfp4_is_a_power_of_two() -> None:
    blocks = torch.full((255, 1, 16), 0x22, dtype=torch.uint8)  # ones
    scales = torch.arange(255, dtype=torch.uint8)[:, None]
    decoded = dequantise_mxfp4(blocks, scales)
    assert decoded.shape == (255, 32)
    assert decoded[:, 7].tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert dequantise_mxfp4(blocks[:1], torch.tensor([[255]], dtype=torch.uint8)).isnan().all()


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (40, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(1, 250, (40, 3), generator=generator, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0].T
    assert torch.equal(dequantise_mxfp4(blocks, scales), expected)


@pytest.mark.parametrize("columns", [128, 256, 300, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_is_what_transformers_makes_of_it(columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (200, columns), generator=generator, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # no numbers
    values = codes.view(torch.float8_e4m3fn)
    scales = torch.rand(2, -(-columns // 128), generator=generator).to(dtype)
    expected = _dequantize_fp8_weight(values, scales, [128, 128], torch.float32)
    of_rows = scales.repeat_interleave(128, 0)[:200]
    decoded = dequantise_fp8_block(values, of_rows)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, expected)


def test_codes_of_float8_that_are_no_numbers_stay_so() -> None:
    values = torch.tensor([[0x7F, 0xFF, 0x7E]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    decoded = dequantise_fp8_block(values, torch.ones(1, 1))
    assert decoded.isnan().tolist() == [[True, True, False]]
    assert decoded[0, 2] == 448
