"""Tensors to the wire and back; what `auto` means for device and dtype."""

from __future__ import annotations

import pytest
import torch

from moesaic.errors import InvalidArgument
from moesaic.tensors import choose_device, choose_dtype, from_wire, to_wire


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (7,)])
def test_a_tensor_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype)
    assert torch.equal(from_wire(to_wire(tensor)), tensor)


def test_a_strided_tensor_is_written_in_its_own_order() -> None:
    tensor = torch.arange(12.0).view(3, 4).t()
    assert torch.equal(from_wire(to_wire(tensor)), tensor)


def test_device_and_dtype_follow_the_machine_and_the_checkpoint() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_device("cpu") == cpu
    assert choose_dtype("auto", cpu, "bfloat16") == torch.float32
    assert choose_dtype("auto", cuda, "bfloat16") == torch.bfloat16
    assert choose_dtype("auto", cuda, "float16") == torch.float32
    assert choose_dtype("bfloat16", cpu, "float32") == torch.bfloat16
    assert choose_dtype("float32", cuda, "bfloat16") == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_refused() -> None:
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(InvalidArgument) as caught:
        choose_device("cuda")
    assert caught.value.field == "device"
