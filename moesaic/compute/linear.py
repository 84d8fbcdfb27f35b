"""A weight matrix in the form in which its product is computed: `Linear` maps rows [n, I] to rows [n, O].

Experts and the router's own projections share it, so that one file decides how a product is computed. The
kernel is chosen by device, dtype, form and width alone, never by a timing: all processes on machines of one
kind give the same bits. On a CPU a float matrix is laid out once for oneDNN, which would otherwise do so in
every call; the bits of a row then depend neither on where its memory lies nor on its place among the rows.

Whether the bits of a row depend on the number of rows in the call is up to the kernel: a single row often
takes another one. With `batch_invariant` all products have the same number of rows, filled up with zeros.

Shapes: n rows, I inputs, O outputs, G groups of inputs.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import InvalidArgument

log = logging.getLogger(__name__)

# How a weight is held. float: as it is given. int8: with one scale per output; rows are quantised one by one
# and sums are exact. int4: with one scale and one zero per group.
WeightForm = Literal["float", "int8", "int4"]

# The number of rows of every batch-invariant product. A smaller one wastes less on a single row, a larger one
# reads the weight less often.
ROW_TILE = 16
# oneDNN keeps megabytes for every number of rows that it has ever seen and never frees them. A product
# therefore has one of these numbers of rows, filled up with zeros; more rows are computed as several
# products.
ROW_COUNTS: tuple[int, ...] = (
    *(1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64),
    *(80, 96, 112, 128, 160, 192, 224, 256),
)
# The number of inputs that share a scale in int4.
INT4_GROUP = 32
# The int4 kernel needs a multiple of this number of outputs.
_INT4_OUTPUTS = 16

_ALIGN_BYTES = 64
# How many rows of a weight are quantised at a time, so that no second weight in full precision is created.
_ROWS_AT_ONCE = 128
# The value that stands for zero in int8 rows, because the kernels read unsigned numbers.
_ROW_ZERO = 128
_TINY = 1e-30


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """A weight that is quantised already: `values` [O, I] int8 from -127 to 127, and `scales` [O] float32.

    `dtype` is the float dtype that it is widened to where there are no 8-bit products.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class HeldWeight:
    """A weight as a Linear holds it: the kernel that computes with it, and the tensors that this kernel reads."""

    kernel: str
    tensors: tuple[Tensor, ...]


class _Product(Protocol):
    """rows [n, I] in `dtype` -> [n, O] in fresh memory of the same dtype."""

    # What it is made of: `type(self)(*tensors)` computes the same bits.
    tensors: tuple[Tensor, ...]
    dtype: torch.dtype
    num_bytes: int
    # The numbers of rows that it should be called with, ascending; empty if any number will do.
    row_counts: tuple[int, ...]

    def __call__(self, rows: Tensor) -> Tensor: ...


class Linear:
    """The product with a weight [O, I], plus a bias [O] if there is one.

    A quantised weight needs the form int8. Raises InvalidArgument for a form in which such a weight cannot be held on its device.
    """

    def __init__(
        self,
        weight: Tensor | Int8Weight,
        form: WeightForm = "float",
        bias: Tensor | None = None,
        *,
        batch_invariant: bool = False,
    ) -> None:
        values = weight.values if isinstance(weight, Int8Weight) else weight
        out_features, in_features = values.shape
        check_form(form, values.device, in_features, out_features)
        self._set(_choose_product(weight, form), bias, out_features, in_features, batch_invariant)

    @classmethod
    def of_held(
        cls,
        held: HeldWeight,
        bias: Tensor | None,
        out_features: int,
        in_features: int,
        *,
        batch_invariant: bool,
    ) -> Self:
        """A Linear of a weight as another one holds it. Raises ValueError for a kernel that is not known."""
        if held.kernel not in _KERNELS:
            raise ValueError(f"no kernel {held.kernel}")
        linear = cls.__new__(cls)
        product = _KERNELS[held.kernel](*held.tensors)
        linear._set(product, bias, out_features, in_features, batch_invariant)
        return linear

    def _set(
        self,
        product: _Product,
        bias: Tensor | None,
        out_features: int,
        in_features: int,
        batch_invariant: bool,
    ) -> None:
        self.out_features, self.in_features = out_features, in_features
        self.device = product.tensors[0].device
        self._product = product
        self._bias = None if bias is None else bias.to(product.dtype)
        # Sums of whole numbers are exact in any order, so int8 products need no tiles.
        in_tiles = batch_invariant and not isinstance(self._product, _Int8)
        self._row_counts = (ROW_TILE,) if in_tiles else self._product.row_counts

    @property
    def held(self) -> HeldWeight:
        """The weight as it is held."""
        return HeldWeight(type(self._product).__name__, self._product.tensors)

    @property
    def bias(self) -> Tensor | None:
        return self._bias

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation and of the outputs."""
        return self._product.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of weight and bias in the form in which they are held, without the padding of a layout."""
        return self._product.num_bytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, rows: Tensor) -> Tensor:
        """rows [n, I] of any float dtype -> [n, O] in fresh memory."""
        rows = rows.to(self.dtype)
        product = (
            _with_counts(self._product, rows, self._row_counts) if self._row_counts else self._product(rows)
        )
        # The addition is the same for a number whatever lies beside it, so it keeps a product
        # batch-invariant.
        return product if self._bias is None else product.add_(self._bias)


def check_form(form: WeightForm, device: torch.device, in_features: int, out_features: int) -> None:
    """Raises InvalidArgument unless a weight of this size can be held in this form on this device."""
    if form != "int4":
        return
    if in_features % INT4_GROUP or out_features % _INT4_OUTPUTS:
        raise InvalidArgument(
            f"int4 needs inputs in multiples of {INT4_GROUP} and outputs in multiples of {_INT4_OUTPUTS}, "
            f"the model has {in_features} and {out_features}"
        )
    if device.type != "cpu" or not _int4_works():
        raise InvalidArgument(f"int4 is not computed on this {device.type}")


def keeps_weight(form: WeightForm, device: torch.device, dtype: torch.dtype, in_features: int) -> bool:
    """Whether a Linear of such a weight keeps the tensor that it is given, rather than a copy."""
    return form == "float" and not (device.type == "cpu" and _packing_works(dtype, in_features))


def _choose_product(weight: Tensor | Int8Weight, form: WeightForm) -> _Product:
    if isinstance(weight, Int8Weight):
        return _choose_int8(weight)
    if form == "int4":
        return _Int4.of(weight)
    if form == "int8":
        return _choose_int8(_quantise_int8(weight))
    kept = keeps_weight(form, weight.device, weight.dtype, weight.shape[1])
    return _Plain(weight) if kept else _Packed.of(weight)


def _choose_int8(weight: Int8Weight) -> _Product:
    on_cpu = weight.values.device.type == "cpu"
    works = on_cpu and _int8_works(weight.values.shape[1])
    return _Int8.of(weight) if works else _WidenedInt8.of(weight)


def _with_counts(product: _Product, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
    """The product of any number of rows, as products with one of the `counts`, which ascend."""
    num_rows = len(rows)
    if num_rows > counts[-1]:
        return torch.cat([_with_counts(product, part, counts) for part in rows.split(counts[-1])])
    count = counts[bisect_left(counts, num_rows)]
    if num_rows == count:
        return product(rows)
    filled = rows.new_zeros(count, rows.shape[1])
    filled[:num_rows] = rows
    return product(filled)[:num_rows]


class _Plain:
    """The weight as it is: on CUDA, and where oneDNN is not available."""

    row_counts: tuple[int, ...] = ()

    def __init__(self, weight: Tensor) -> None:
        self.tensors: tuple[Tensor, ...] = (weight,)
        self.dtype = weight.dtype
        self.num_bytes = weight.nbytes
        self._weight = weight

    def __call__(self, rows: Tensor) -> Tensor:
        # The last bits of this product depend on the alignment of its operands.
        if rows.device.type == "cpu" and rows.data_ptr() % _ALIGN_BYTES:
            rows = rows.clone()
        return F.linear(rows, self._weight)


class _Packed:
    """The weight in oneDNN's own layout."""

    row_counts: tuple[int, ...] = ROW_COUNTS

    def __init__(self, packed: Tensor) -> None:
        self.tensors: tuple[Tensor, ...] = (packed,)
        self.dtype = packed.dtype
        self.num_bytes = packed.numel() * packed.element_size()
        self._weight = packed
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight, None))

    def __call__(self, rows: Tensor) -> Tensor:
        product: Tensor = self._multiply(rows, self._weight, None, "none", [], "")
        return product


class _Int8:
    """Weight and rows in 8 bits, for CPUs with 8-bit products: one scale per output and one per row."""

    dtype = torch.float32
    row_counts: tuple[int, ...] = ROW_COUNTS

    def __init__(self, packed: Tensor, scales: Tensor) -> None:
        self.tensors: tuple[Tensor, ...] = (packed, scales)
        self._scales = scales
        self.num_bytes = packed.numel() + scales.nbytes
        self._zeros = torch.zeros(len(scales), dtype=torch.int32)
        self._weight = packed
        self._multiply = torch.ops.onednn.qlinear_pointwise.default

    @classmethod
    def of(cls, weight: Int8Weight) -> Self:
        return cls(torch.ops.onednn.qlinear_prepack(weight.values, None), weight.scales)

    def __call__(self, rows: Tensor) -> Tensor:
        scales = rows.abs().amax(-1, keepdim=True).mul_(1 / 127).clamp_min_(_TINY)
        # Truncating after a half is added rounds to the nearest number.
        quantised = (rows / scales).add_(_ROW_ZERO + 0.5).to(torch.uint8)
        product: Tensor = self._multiply(
            *(quantised, 1.0, _ROW_ZERO),
            *(self._weight, self._scales, self._zeros),
            *(None, 1.0, 0, torch.float32, "none", [], ""),
        )
        return product.mul_(scales)


class _WidenedInt8:
    """A weight in 8 bits that is widened for every product: on CUDA, and on CPUs without 8-bit products."""

    row_counts: tuple[int, ...] = ()

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        """`scales` are in the dtype that the weight is widened to."""
        self.tensors: tuple[Tensor, ...] = (values, scales)
        self.dtype = scales.dtype
        self._weight = values
        self._scales = scales
        self.num_bytes = values.nbytes + scales.nbytes

    @classmethod
    def of(cls, weight: Int8Weight) -> Self:
        return cls(weight.values, weight.scales.to(weight.dtype))

    def __call__(self, rows: Tensor) -> Tensor:
        # Whole numbers up to 127 are exact in every float dtype.
        return _Plain(self._weight.to(self.dtype))(rows).mul_(self._scales)


class _Int4:
    """A weight in 4 bits, widened inside the kernel, which computes in bfloat16."""

    dtype = torch.bfloat16
    row_counts: tuple[int, ...] = ()

    def __init__(self, packed: Tensor, scales_and_zeros: Tensor) -> None:
        self.tensors: tuple[Tensor, ...] = (packed, scales_and_zeros)
        self._weight, self._scales_and_zeros = packed, scales_and_zeros
        self.num_bytes = packed.nbytes + scales_and_zeros.nbytes
        self._multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        quantised, scales_and_zeros = _quantise_int4(weight)
        return cls(torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantised, 1), scales_and_zeros)

    def __call__(self, rows: Tensor) -> Tensor:
        product: Tensor = self._multiply(rows, self._weight, INT4_GROUP, self._scales_and_zeros)
        return product


_KERNELS: dict[str, Callable[..., _Product]] = {
    kernel.__name__: kernel for kernel in (_Plain, _Packed, _Int8, _WidenedInt8, _Int4)
}


def _quantise_int8(weight: Tensor) -> Int8Weight:
    largest = torch.maximum(weight.amax(1), weight.amin(1).neg_()).float()
    scales = largest.mul_(1 / 127).clamp_min_(_TINY)
    quantised = torch.empty_like(weight, dtype=torch.int8)
    for part, of, scale in zip(*(x.split(_ROWS_AT_ONCE) for x in (quantised, weight, scales)), strict=True):
        part.copy_((of / scale[:, None]).round_())
    return Int8Weight(quantised, scales, weight.dtype)


def _quantise_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [O, I] from 0 to 15, and bfloat16 [G, O, 2]: each group's scale and the value of its 8."""
    quantised = torch.empty_like(weight, dtype=torch.int32)
    scales_and_zeros = []
    for part, of in zip(quantised.split(_ROWS_AT_ONCE), weight.split(_ROWS_AT_ONCE), strict=True):
        groups = of.float().unflatten(1, (-1, INT4_GROUP))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        # Scale and zero are rounded to bfloat16 first, so that the steps are computed from the numbers that
        # are held.
        scale = ((high - low) / 15).clamp_min_(_TINY).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        steps = (groups - zero.float()).div_(scale.float()).round_().add_(8).clamp_(0, 15)
        part.copy_(steps.flatten(1))
        scales_and_zeros.append(torch.cat((scale, zero), -1))
    return quantised, torch.cat(scales_and_zeros).transpose(0, 1).contiguous()


# The packed products are not a documented part of torch. Each is therefore tried on a small weight before it
# is used, once per process, dtype and width. The weight is always the same, and so is the result.

_PROBE_OUTPUTS = 64
_PROBE_ROWS = (1, 3, ROW_TILE)


@lru_cache
def _packing_works(dtype: torch.dtype, in_features: int) -> bool:
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    return dtype in (torch.float32, torch.bfloat16) and _agrees(
        _Packed.of, dtype, in_features, tolerance, name="packed"
    )


@lru_cache
def _int8_works(in_features: int) -> bool:
    # The tolerance allows for rounding to 8 bits. A CPU whose sums of 8-bit products overflow is far beyond
    # it.
    return _agrees(_quantised, torch.float32, in_features, 3e-2, name="int8")


def _quantised(weight: Tensor) -> _Int8:
    return _Int8.of(_quantise_int8(weight))


@lru_cache
def _int4_works() -> bool:
    return _agrees(_Int4.of, torch.float32, 4 * INT4_GROUP, 3e-1, name="int4")


def _agrees(
    make: Callable[[Tensor], _Product], dtype: torch.dtype, in_features: int, tolerance: float, *, name: str
) -> bool:
    """Whether the kernel exists and its error, relative to the plain product, is within `tolerance`."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_PROBE_OUTPUTS, in_features, generator=generator)
    weight[0] = 1
    try:
        product = make(weight.to(dtype))
        for num_rows in _PROBE_ROWS:
            rows = torch.randn(num_rows, in_features, generator=generator)
            # The largest row against the largest weights: if sums of 8-bit products overflow at all, this one
            # does.
            rows[-1] = 1
            expected = F.linear(rows, weight)
            error = (product(rows.to(product.dtype)).float() - expected).norm() / expected.norm()
            if not error <= tolerance:
                raise RuntimeError(f"relative error {error:.3g}")
    except (RuntimeError, AttributeError, TypeError) as error:
        log.warning(
            "a kernel is not usable here, plain products take its place",
            extra={"fields": {"kernel": name, "why": str(error)[:200]}},
        )
        return False
    return True
