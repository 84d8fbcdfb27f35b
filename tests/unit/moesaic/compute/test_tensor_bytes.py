"""Tensors as bytes and back, without a copy."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from moesaic.compute.linear import Linear, WeightForm
from moesaic.compute.tensor_bytes import TensorLayout, bytes_of, layout_of, probe_layout, view_bytes

pytestmark = pytest.mark.skipif(probe_layout() is None, reason="packed weights cannot be viewed here")


def copied(tensor: Tensor) -> Tensor:
    return view_bytes(memoryview(bytes(bytes_of(tensor))), layout_of(tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["float", "int8", "int4"])
def test_a_product_with_viewed_weights_has_the_same_bits(form: WeightForm, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(160, 96).to(dtype), torch.randn(160).to(dtype)
    linear = Linear(weight, form, bias)
    held = linear.held
    viewed = Linear.of_held(
        type(held)(held.kernel, tuple(map(copied, held.tensors))),
        copied(bias),
        160,
        96,
        batch_invariant=False,
    )
    assert (viewed.num_bytes, viewed.dtype) == (linear.num_bytes, linear.dtype)
    for num_rows in (1, 3, 16, 200):
        rows = torch.randn(num_rows, 96)
        assert torch.equal(viewed(rows), linear(rows))


def test_a_view_lies_in_the_bytes_and_keeps_them_until_it_goes() -> None:
    numbers = torch.arange(6, dtype=torch.float32)
    memory = memoryview(bytearray(bytes_of(numbers)))
    tensor = view_bytes(memory, TensorLayout("float32", (2, 3)))
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    memory.cast("f")[5] = 7.0
    assert tensor[1, 2] == 7
    gone = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "layout", [TensorLayout("float99", (1,)), TensorLayout("float32", (5,)), TensorLayout("bfloat16", (9,))]
)
def test_a_layout_that_the_bytes_cannot_have_is_refused(layout: TensorLayout) -> None:
    with pytest.raises(ValueError, match=r"float99|needed"):
        view_bytes(memoryview(bytes(16)), layout)
