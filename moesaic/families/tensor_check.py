"""Checks that a checkpoint has exactly the tensors of the model that its config describes, each with the right shape and
dtype. This is done before any weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.errors import CheckpointError
from moesaic.families.config import Config
from moesaic.families.model import DenseTensor, ExpertLayer, Layout, MoeModel, WeightPattern

DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
FP8_BLOCK = 128
MXFP4_GROUP = 32
# Old checkpoints contain rotary frequencies, which are computed, never read.
_IGNORED_ENDINGS = ("rotary_emb.inv_freq",)


def find_layout(checkpoint: Checkpoint, layouts: Iterable[Layout], layer: int = 0) -> Layout:
    """The first layout whose first weight of slot 0 is present. Raises CheckpointError, which names the expected tensor."""
    layouts = tuple(layouts)
    for layout in layouts:
        if _first(layout).name(layer, 0) in checkpoint.tensors:
            return layout
    expected = _first(layouts[0]).name(layer, 0)
    raise CheckpointError(f"tensor {expected} is missing: no known expert layout", field=expected)


def stored_dtype(checkpoint: Checkpoint, name: str) -> str:
    """The float type of a tensor. All expert weights must have the same; `check_tensors` accepts others for the rest."""
    entry = checkpoint.tensors.get(name)
    if entry is None:
        raise CheckpointError(
            f"tensor {name} is missing, by {checkpoint.config_file} it must be there", field=name
        )
    if entry.dtype not in DTYPE_NAMES:
        supported = ", ".join(DTYPE_NAMES)
        raise CheckpointError(f"tensor {name} is {entry.dtype}; supported: {supported}", field=name)
    return DTYPE_NAMES[entry.dtype]


def check_tensors(checkpoint: Checkpoint, model: MoeModel) -> None:
    """Raises CheckpointError with the name of the first tensor that is missing, wrong or not part of the model."""
    expected: set[str] = set()
    # The tensors are checked one by one because a config may promise more of them than memory could list.
    for name, (shape, dtypes) in _expected(model):
        _check(checkpoint, name, shape, dtypes)
        expected.add(name)
    for name in sorted(checkpoint.tensors):
        if name in expected or name in model.ignored or name.endswith(_IGNORED_ENDINGS):
            continue
        raise CheckpointError(f"tensor {name} is not part of the model", field=name)


def check_sizes(
    checkpoint: Checkpoint, config: Config, size_checks: Iterable[tuple[str, int, str, int]]
) -> None:
    """Raises CheckpointError, which names the config key. If a size of the config is wrong, many tensors disagree with it,
    so the key says more than the first of these tensors.

    A check is a key, the size that follows from it, a tensor, and the dimension of it that must have this size.
    """
    for key, size, name, dimension in size_checks:
        entry = checkpoint.tensors.get(name)
        if entry is not None and len(entry.shape) > 1 and entry.shape[dimension] != size:
            config.fail(key, f"does not match tensor {name} of shape {list(entry.shape)}")


def check_num_layers(checkpoint: Checkpoint, config: Config, key: str, num_layers: int, prefix: str) -> None:
    """Raises CheckpointError if there are tensors of more layers; `prefix` has {layer} and ends with a dot."""
    beyond = prefix.format(layer=num_layers)
    if any(name.startswith(beyond) for name in checkpoint.tensors):
        config.fail(key, f"is {num_layers}, but there are tensors of more layers")


def _first(layout: Layout) -> WeightPattern:
    return next(iter(layout.values()))


_Expected = tuple[tuple[int, ...], tuple[str, ...]]
_FLOATS = tuple(DTYPE_NAMES)


def _expected(model: MoeModel) -> Iterator[tuple[str, _Expected]]:
    """Every tensor that the files must have, with its shape and the dtypes that it may have."""
    yield from _expected_dense(model.dense)
    for layer, experts in model.experts.items():
        yield from _expected_experts(layer, experts)


def _expected_dense(dense: Mapping[str, DenseTensor]) -> Iterator[tuple[str, _Expected]]:
    ends: dict[str, int] = {}
    for tensor in dense.values():
        if tensor.rows is not None:
            ends[tensor.source] = max(ends.get(tensor.source, 0), tensor.rows[1])
    for tensor in dense.values():
        shape = tensor.shape if tensor.rows is None else (ends[tensor.source], *tensor.shape[1:])
        if tensor.scales is None:
            yield tensor.source, (shape, _FLOATS)
        else:
            yield tensor.source, (shape, ("F8_E4M3",))
            yield tensor.scales, (_blocks(shape), _FLOATS)


def _expected_experts(layer: int, experts: ExpertLayer) -> Iterator[tuple[str, _Expected]]:
    plain = next(name for name, dtype in DTYPE_NAMES.items() if dtype == experts.dtype)
    for weight, pattern in experts.layout.items():
        shape = _stored_shape(experts, weight, pattern)
        for slot in range(1 if pattern.stacked else experts.num_slots):
            name, scales = pattern.name(layer, slot), pattern.scales_name(layer, slot)
            if scales is None:
                yield name, (shape, (plain,))
            elif pattern.encoding == "fp8_block":
                yield name, (shape, ("F8_E4M3",))
                yield scales, (_blocks(shape), _FLOATS)
            else:
                groups = _groups(name, shape)
                yield name, ((*groups, MXFP4_GROUP // 2), ("U8",))
                yield scales, (groups, ("U8",))


def _stored_shape(experts: ExpertLayer, weight: str, pattern: WeightPattern) -> tuple[int, ...]:
    shape = experts.module.shape(weight)
    shape = (shape[0] * pattern.part[1], *shape[1:])
    if pattern.transposed:
        shape = shape[::-1]
    return (experts.num_slots, *shape) if pattern.stacked else shape


def _blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], -(-shape[-2] // FP8_BLOCK), -(-shape[-1] // FP8_BLOCK))


def _groups(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if shape[-1] % MXFP4_GROUP:
        raise CheckpointError(
            f"tensor {name} is in groups of {MXFP4_GROUP}, into which rows of {shape[-1]} do not go",
            field=name,
        )
    return (*shape[:-1], shape[-1] // MXFP4_GROUP)


def _check(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    entry = checkpoint.tensors.get(name)
    if entry is None:
        raise CheckpointError(
            f"tensor {name} is missing, by {checkpoint.config_file} it must be there", field=name
        )
    if entry.shape != shape:
        raise CheckpointError(
            f"tensor {name} has shape {list(entry.shape)}, by {checkpoint.config_file} it must be {list(shape)}",
            field=name,
        )
    if entry.dtype not in dtypes:
        expected = (
            DTYPE_NAMES.get(dtypes[0], dtypes[0])
            if len(dtypes) == 1
            else "a floating point dtype of 2 or 4 bytes"
        )
        raise CheckpointError(f"tensor {name} is {entry.dtype}, it must be {expected}", field=name)
