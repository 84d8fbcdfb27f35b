"""What a checkpoint's model is, as far as router and workers must agree on it: its shape, its gate rule, its experts.

A family is data: the config keys it goes by, and for every on-disk layout the tensor (or the part of a stacked tensor)
that holds each weight of an expert. Where config and tensors disagree, the model is refused here, before any weight
is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from moesaic.checkpoint import CONFIG_FILE, Checkpoint
from moesaic.errors import CheckpointError, InvalidArgument

# Shapes: D hidden_size, F inner_size, E num_slots, V vocab_size, H query heads, G key/value heads, d head_dim.

DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class GateRule:
    """How gate logits become an assignment: softmax in fp32, the `top_k` best slots, renormalised to one or not."""

    top_k: int
    renormalise: bool


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """Where one weight of one expert lies: `tensor[index][rows[0]:rows[1]]`, without what is None."""

    tensor: str
    index: int | None
    rows: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class WeightPattern:
    """Where one weight lies for every layer and slot: a tensor of its own, or a part of one tensor that stacks all slots.

    `part` (i, n): the i-th of n equal runs of rows.
    """

    tensor: str
    part: tuple[int, int] = (0, 1)

    @property
    def stacked(self) -> bool:
        return "{slot}" not in self.tensor

    def name(self, layer: int, slot: int) -> str:
        return self.tensor.format(layer=layer, slot=slot)


# The patterns of "gate", "up" and "down".
Layout = Mapping[str, WeightPattern]


@dataclass(frozen=True, slots=True)
class MoeModel:
    """A mixture-of-experts model as its checkpoint describes it. `dtype` is that of the expert weights on disk."""

    family: str
    num_layers: int
    num_slots: int
    hidden_size: int
    inner_size: int
    activation: str
    dtype: str
    vocab_size: int
    max_model_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None
    gate: GateRule
    layout: Layout

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert on disk."""
        return 3 * self.hidden_size * self.inner_size * ITEM_BYTES[self.dtype]

    @property
    def expert_tensors(self) -> frozenset[str]:
        """Names of all tensors that hold expert weights; the router never reads them."""
        return frozenset(name for name, _ in _expert_shapes(self))

    def weight_shape(self, weight: str) -> tuple[int, int]:
        """[F, D] of gate and up, [D, F] of down."""
        shape = (self.inner_size, self.hidden_size)
        return shape if weight != "down" else shape[::-1]

    def context_length(self, wanted: int | None) -> int:
        """The longest sequence to serve. Raises InvalidArgument for more than the model was made for."""
        if wanted is not None and wanted > self.max_model_len:
            raise InvalidArgument(
                f"max_model_len: the model's context has {self.max_model_len} tokens", field="max_model_len"
            )
        return wanted or self.max_model_len

    def expert_weights(self, layer: int, slot: int) -> dict[str, WeightSlice]:
        """Where "gate", "up" and "down" of one expert lie."""
        return {
            weight: WeightSlice(
                pattern.name(layer, slot),
                slot if pattern.stacked else None,
                _row_range(pattern, self.weight_shape(weight)[0]),
            )
            for weight, pattern in self.layout.items()
        }


def describe_model(checkpoint: Checkpoint) -> MoeModel:
    """What the checkpoint holds. Raises CheckpointError that names the config key or the tensor that is wrong."""
    config = _Config(checkpoint.config)
    family = checkpoint.config.get("model_type")
    describe = _FAMILIES.get(family) if isinstance(family, str) else None
    if describe is None:
        supported = ", ".join(sorted(_FAMILIES))
        config.fail("model_type", f"{str(family)[:64]!r} is not served; supported: {supported}")
    if checkpoint.config.get("quantization_config") is not None:
        config.fail("quantization_config", "quantised checkpoints are not served")
    return describe(checkpoint, config)


class _Config:
    """config.json with checked values: every complaint names its key."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def fail(self, key: str, problem: str) -> NoReturn:
        field = f"{CONFIG_FILE}: {key}"
        raise CheckpointError(f"{field}: {problem}", field=field)

    def size(self, *keys: str) -> int:
        """A required whole number above zero, under the first of its spellings that is there."""
        key = next((key for key in keys if key in self._values), keys[0])
        if key not in self._values:
            self.fail(key, "is missing")
        value = self._values[key]
        if type(value) is not int or value < 1:
            self.fail(key, "must be a whole number above zero")
        return value

    def optional_size(self, key: str) -> int | None:
        return None if self._values.get(key) is None else self.size(key)

    def flag(self, key: str, default: bool) -> bool:
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, "must be true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self._values.get(key, allowed[0])
        if value not in allowed:
            self.fail(key, f"must be one of: {', '.join(allowed)}")
        return str(value)


_MIXTRAL_LAYOUTS: tuple[Layout, ...] = (
    {  # classic: what the published checkpoints and `save_pretrained` hold
        "gate": WeightPattern("model.layers.{layer}.block_sparse_moe.experts.{slot}.w1.weight"),
        "up": WeightPattern("model.layers.{layer}.block_sparse_moe.experts.{slot}.w3.weight"),
        "down": WeightPattern("model.layers.{layer}.block_sparse_moe.experts.{slot}.w2.weight"),
    },
    {  # fused: all slots of a layer stacked, gate rows above up rows
        "gate": WeightPattern("model.layers.{layer}.mlp.experts.gate_up_proj", part=(0, 2)),
        "up": WeightPattern("model.layers.{layer}.mlp.experts.gate_up_proj", part=(1, 2)),
        "down": WeightPattern("model.layers.{layer}.mlp.experts.down_proj"),
    },
)
_MIXTRAL_GATES = (
    "model.layers.{layer}.block_sparse_moe.gate.weight",
    "model.layers.{layer}.mlp.gate.weight",
)


def _describe_mixtral(checkpoint: Checkpoint, config: _Config) -> MoeModel:
    layout = _find_layout(checkpoint, _MIXTRAL_LAYOUTS)
    num_heads = config.size("num_attention_heads")
    hidden_size = config.size("hidden_size")
    model = MoeModel(
        family="mixtral",
        num_layers=config.size("num_hidden_layers"),
        num_slots=config.size("num_local_experts", "num_experts"),
        hidden_size=hidden_size,
        inner_size=config.size("intermediate_size"),
        activation=config.choice("hidden_act", ("silu",)),
        dtype=_expert_dtype(checkpoint, layout),
        vocab_size=config.size("vocab_size"),
        max_model_len=config.size("max_position_embeddings"),
        num_heads=num_heads,
        num_kv_heads=config.optional_size("num_key_value_heads") or num_heads,
        head_dim=config.optional_size("head_dim") or hidden_size // num_heads,
        sliding_window=config.optional_size("sliding_window"),
        gate=GateRule(top_k=config.size("num_experts_per_tok"), renormalise=True),
        layout=layout,
    )
    if model.gate.top_k > model.num_slots:
        config.fail("num_experts_per_tok", f"must be at most num_local_experts, {model.num_slots}")
    if model.num_heads % model.num_kv_heads:
        config.fail("num_key_value_heads", "must divide num_attention_heads")
    gate = _MIXTRAL_GATES[_MIXTRAL_LAYOUTS.index(layout)]
    _check_sizes(checkpoint, model, gate, config)
    tied = config.flag("tie_word_embeddings", default=False)
    _check_shapes(checkpoint, dict(_mixtral_shapes(model, gate, tied)))
    _check_shapes(checkpoint, dict(_expert_shapes(model)), dtype=model.dtype)
    return model


def _mixtral_shapes(model: MoeModel, gate: str, tied: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that is no expert's."""
    hidden, heads, kv_heads = (
        model.hidden_size,
        model.num_heads * model.head_dim,
        model.num_kv_heads * model.head_dim,
    )
    yield "model.embed_tokens.weight", (model.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (model.vocab_size, hidden)
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (heads, hidden)
        yield prefix + "self_attn.k_proj.weight", (kv_heads, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv_heads, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, heads)
        yield gate.format(layer=layer), (model.num_slots, hidden)


def _expert_shapes(model: MoeModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that holds expert weights, with its whole shape; a stacked one comes once per layer."""
    for weight, pattern in model.layout.items():
        rows, columns = model.weight_shape(weight)
        whole = (rows * pattern.part[1], columns)
        for layer in range(model.num_layers):
            if pattern.stacked:
                yield pattern.name(layer, 0), (model.num_slots, *whole)
            else:
                yield from ((pattern.name(layer, slot), whole) for slot in range(model.num_slots))


def _row_range(pattern: WeightPattern, num_rows: int) -> tuple[int, int] | None:
    part, num_parts = pattern.part
    return None if num_parts == 1 else (part * num_rows, (part + 1) * num_rows)


def _find_layout(checkpoint: Checkpoint, layouts: tuple[Layout, ...]) -> Layout:
    for layout in layouts:
        if layout["gate"].name(0, 0) in checkpoint.tensors:
            return layout
    expected = layouts[0]["gate"].name(0, 0)
    raise CheckpointError(f"tensor {expected} is missing: no known expert layout", field=expected)


def _expert_dtype(checkpoint: Checkpoint, layout: Layout) -> str:
    """The dtype of the first expert weight; all others must have the same."""
    name = layout["gate"].name(0, 0)
    dtype = checkpoint.tensors[name].dtype
    if dtype not in DTYPE_NAMES:
        supported = ", ".join(DTYPE_NAMES)
        raise CheckpointError(f"tensor {name} is {dtype}; supported: {supported}", field=name)
    return DTYPE_NAMES[dtype]


def _check_sizes(checkpoint: Checkpoint, model: MoeModel, gate: str, config: _Config) -> None:
    """Where one size of the config is wrong, many tensors disagree with it: name the config key, not the first tensor."""
    pattern = model.layout["gate"]
    witnesses = (
        ("vocab_size", model.vocab_size, "model.embed_tokens.weight", 0),
        ("hidden_size", model.hidden_size, "model.embed_tokens.weight", 1),
        ("num_local_experts", model.num_slots, gate.format(layer=0), 0),
        ("intermediate_size", model.inner_size * pattern.part[1], pattern.name(0, 0), -2),
    )
    for key, expected, name, dimension in witnesses:
        entry = checkpoint.tensors.get(name)
        if entry is not None and len(entry.shape) > 1 and entry.shape[dimension] != expected:
            config.fail(key, f"does not match tensor {name} of shape {list(entry.shape)}")
    if any(name.startswith(f"model.layers.{model.num_layers}.") for name in checkpoint.tensors):
        config.fail("num_hidden_layers", f"is {model.num_layers}, but there are tensors of more layers")


def _check_shapes(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], *, dtype: str | None = None
) -> None:
    for name, shape in shapes.items():
        entry = checkpoint.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"tensor {name} is missing, by config.json it must be there", field=name)
        if entry.shape != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(entry.shape)}, by config.json it must be {list(shape)}",
                field=name,
            )
        found = DTYPE_NAMES.get(entry.dtype)
        if found is None or found != (dtype or found):
            expected = dtype or "a floating point dtype of 2 or 4 bytes"
            raise CheckpointError(f"tensor {name} is {entry.dtype}, it must be {expected}", field=name)


_FAMILIES: dict[str, Callable[[Checkpoint, _Config], MoeModel]] = {"mixtral": _describe_mixtral}
