"""Every form of a weight against the plain product, and bit for bit against itself."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.compute import linear as linear_module
from moesaic.compute.linear import ROW_TILE, Linear, WeightForm
from moesaic.errors import InvalidArgument

DTYPES = (torch.float32, torch.bfloat16)
# Aligned, and at no size by chance.
SHAPES = ((96, 64), (31, 23), (1024, 200), (16, 3000))
COUNTS = (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100)


def random_weight(outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)) / inputs**0.5
    return weight.to(dtype)


def random_rows(count: int, inputs: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(computed: Tensor, expected: Tensor) -> float:
    return float((computed.float() - expected.float()).norm() / expected.float().norm())


def shifted(rows: Tensor, items: int) -> Tensor:
    """The same rows, `items` numbers away from aligned memory."""
    memory = torch.empty(rows.numel() + 64, dtype=rows.dtype)
    start = -memory.data_ptr() % 64 // rows.itemsize + items
    view = memory[start : start + rows.numel()].view_as(rows)
    return view.copy_(rows)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which only plain products work."""
    monkeypatch.setattr(linear_module, "_packing_works", lambda *_: False)
    monkeypatch.setattr(linear_module, "_int8_works", lambda *_: False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_float_weight_multiplies_as_the_plain_product_does(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = random_weight(*shape, dtype)
    linear = Linear(weight)
    assert (linear.out_features, linear.in_features) == shape
    assert (linear.dtype, linear.num_bytes) == (dtype, weight.nbytes)
    for count in COUNTS:
        rows = random_rows(count, shape[1], dtype)
        product = linear(rows)
        assert product.dtype == dtype and product.shape == (count, shape[0])
        assert relative_error(product, F.linear(rows, weight)) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("form", "limit"), [("int8", 0.02), ("int4", 0.15)], ids=["int8", "int4"])
def test_a_quantised_weight_stays_within_its_error(form: WeightForm, limit: float) -> None:
    weight = random_weight(96, 256)
    linear = Linear(weight, form)
    for count in COUNTS:
        rows = random_rows(count, 256)
        assert relative_error(linear(rows), F.linear(rows, weight)) < limit


def test_quantised_weights_count_their_bytes_with_their_scales() -> None:
    weight = random_weight(96, 256)
    assert Linear(weight, "int8").num_bytes == 96 * 256 + 96 * 4
    assert Linear(weight, "int4").num_bytes == 96 * 256 // 2 + 96 * 256 // 32 * 2 * 2


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_weights_and_rows_of_zeros_give_zeros(form: WeightForm) -> None:
    weight = random_weight(32, 64)
    weight[3] = 0
    rows = random_rows(4, 64)
    rows[2] = 0
    product = Linear(weight, form)(rows)
    assert not product[2].any() and not product[:, 3].any()
    assert product[0].any()


def test_rows_of_very_different_size_are_quantised_one_by_one() -> None:
    weight, rows = random_weight(96, 256), random_rows(3, 256)
    rows[0] *= 1e6
    rows[2] *= 1e-6
    product = Linear(weight, "int8")(rows)
    for computed, row in zip(product, rows, strict=True):
        assert relative_error(computed, F.linear(row, weight)) < 0.02


@pytest.mark.parametrize("form", ["float", "int8", "int4"])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("row_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_any_float_dtype_are_taken(
    form: WeightForm, weight_dtype: torch.dtype, row_dtype: torch.dtype
) -> None:
    weight, rows = random_weight(64, 64, weight_dtype), random_rows(3, 64, row_dtype)
    linear = Linear(weight, form)
    product = linear(rows)
    assert product.dtype == linear.dtype
    assert relative_error(product, F.linear(rows.float(), weight.float())) < 0.15


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["float", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_where_its_operands_lie_does_not_change_a_bit(
    shape: tuple[int, int], form: WeightForm, dtype: torch.dtype
) -> None:
    linear = Linear(random_weight(*shape, dtype), form)
    for count in (1, 2, 3, 7, 16):
        rows = random_rows(count, shape[1], dtype)
        expected = linear(rows)
        assert all(torch.equal(linear(shifted(rows, items)), expected) for items in (1, 2, 4, 7, 8, 15))


def test_nor_does_it_where_only_plain_products_work(without_kernels: None) -> None:
    linear = Linear(random_weight(31, 23))
    rows = random_rows(3, 23)
    assert all(torch.equal(linear(shifted(rows, items)), linear(rows)) for items in (1, 2, 4, 7, 8, 15))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["float", "int8"])
def test_a_batch_invariant_product_gives_a_row_the_same_bits_in_any_company(
    shape: tuple[int, int], form: WeightForm, dtype: torch.dtype
) -> None:
    assert_invariant(Linear(random_weight(*shape, dtype), form, batch_invariant=True), dtype)


def test_a_batch_invariant_product_of_four_bits_does_so_too() -> None:
    assert_invariant(Linear(random_weight(96, 256), "int4", batch_invariant=True), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["float", "int8"])
def test_and_so_do_batch_invariant_plain_products(
    without_kernels: None, form: WeightForm, dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        assert_invariant(Linear(random_weight(*shape, dtype), form, batch_invariant=True), dtype)


def assert_invariant(linear: Linear, dtype: torch.dtype) -> None:
    row = random_rows(1, linear.in_features, dtype, seed=1)
    alone = linear(row)[0]
    for count in COUNTS:
        company = random_rows(count, linear.in_features, dtype)
        for place in {0, 1, count // 2, count - 1} & set(range(count)):
            rows = company.clone()
            rows[place] = row
            assert torch.equal(linear(rows)[place], alone), (count, place)


def test_every_place_in_a_tile_gives_the_same_bits() -> None:
    for dtype in DTYPES:
        linear = Linear(random_weight(1024, 200, dtype), batch_invariant=True)
        row = random_rows(1, 200, dtype, seed=1)
        for place in range(ROW_TILE):
            rows = random_rows(ROW_TILE, 200, dtype)
            rows[place] = row
            assert torch.equal(linear(rows)[place], linear(row)[0])


@pytest.mark.parametrize("form", ["float", "int8"])
def test_without_the_kernels_plain_products_take_their_place(without_kernels: None, form: WeightForm) -> None:
    weight, rows = random_weight(96, 64), random_rows(5, 64)
    assert relative_error(Linear(weight, form)(rows), F.linear(rows, weight)) < 0.01


def test_a_kernel_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(linear_module._Packed):
        def __call__(self, rows: Tensor) -> Tensor:
            return super().__call__(rows) * 1.01

    monkeypatch.setattr(linear_module, "_Packed", Wrong)
    linear_module._packing_works.cache_clear()
    with caplog.at_level(logging.WARNING):
        linear = Linear(weight := random_weight(96, 64))
    linear_module._packing_works.cache_clear()
    assert "not usable" in caplog.text
    rows = random_rows(5, 64)
    assert torch.equal(linear(rows), F.linear(rows, weight))


def test_a_torch_without_the_kernels_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    linear_module._packing_works.cache_clear()
    rows, weight = random_rows(5, 64), random_weight(96, 64)
    assert torch.equal(Linear(weight)(rows), F.linear(rows, weight))
    linear_module._packing_works.cache_clear()
    assert "not usable" in caplog.text


@pytest.mark.parametrize("shape", [(32, 48), (24, 64)])
def test_a_weight_that_int4_cannot_hold_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgument, match="int4 needs"):
        Linear(random_weight(*shape), "int4")


@pytest.mark.parametrize("form", ["float", "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_is_added_to_the_product(form: WeightForm, dtype: torch.dtype) -> None:
    weight, bias = random_weight(96, 256, dtype), torch.linspace(-2, 2, 96).to(dtype)
    bare, biased = Linear(weight, form), Linear(weight, form, bias)
    rows = random_rows(5, 256, dtype)
    assert torch.equal(biased(rows), bare(rows) + bias.to(bare.dtype))
    assert biased.num_bytes == bare.num_bytes + 96 * bare.dtype.itemsize


@pytest.mark.parametrize("form", ["float", "int8", "int4"])
def test_a_batch_invariant_product_with_a_bias_is_batch_invariant(form: WeightForm) -> None:
    bias = torch.linspace(-2, 2, 96)
    assert_invariant(Linear(random_weight(96, 256), form, bias, batch_invariant=True), torch.float32)
