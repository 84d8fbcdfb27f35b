"""Checkpoints whose weights are stored in fewer bits: which kinds are understood, and which tensors are so stored.

Weights are decoded as they are loaded; everything is computed in the dtype of the tensors that are not encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families.config import Config
from moesaic.families.model import DenseTensor, Encoding, ExpertLayer, MoeModel, WeightPattern
from moesaic.families.tensor_check import FP8_BLOCK, stored_dtype

_KEY = "quantization_config"
_FLOAT8 = "F8_E4M3"
# What the factors of a float8 tensor are called, behind its name.
SCALES = "_scale_inv"
_ENCODED = frozenset({_FLOAT8, "U8"})
_EMBEDDING = "model.embed_tokens.weight"


def read_encoding(config: Config) -> Encoding:
    """How the config says that weights are stored. What is not understood is refused by name."""
    if not config.has(_KEY):
        return "plain"
    values = config.values[_KEY]
    if not isinstance(values, Mapping):
        config.fail(_KEY, "must be an object")
    method = values.get("quant_method")
    if method == "mxfp4":
        return "mxfp4"
    if method != "fp8":
        config.fail(f"{_KEY}.quant_method", f"{str(method)[:64]!r} is not understood; understood: fp8, mxfp4")
    if values.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        config.fail(f"{_KEY}.fmt", "must be e4m3")
    if values.get("weight_block_size") != [FP8_BLOCK, FP8_BLOCK]:
        config.fail(f"{_KEY}.weight_block_size", f"must be [{FP8_BLOCK}, {FP8_BLOCK}]")
    return "fp8_block"


def decoded_dtype(checkpoint: Checkpoint, name: str, embedding: str = _EMBEDDING) -> str:
    """The dtype of a weight once it is decoded: its own, or that of the embedding, which is never encoded."""
    entry = checkpoint.tensors.get(name)
    return stored_dtype(checkpoint, embedding if entry is not None and entry.dtype in _ENCODED else name)


def in_float8(checkpoint: Checkpoint, model: MoeModel) -> MoeModel:
    """The same model, reading through their scales the tensors that are float8 in this checkpoint."""
    return replace(
        model,
        experts={layer: _layer(checkpoint, layer, experts) for layer, experts in model.experts.items()},
        dense={name: _tensor(checkpoint, tensor) for name, tensor in model.dense.items()},
    )


def _layer(checkpoint: Checkpoint, layer: int, experts: ExpertLayer) -> ExpertLayer:
    def pattern(plain: WeightPattern) -> WeightPattern:
        if plain.stacked or not _is_float8(checkpoint, plain.name(layer, 0)):
            return plain
        return replace(plain, encoding="fp8_block", scales=plain.tensor + SCALES)

    layout = {weight: pattern(plain) for weight, plain in experts.layout.items()}
    return replace(experts, layout=layout)


def _tensor(checkpoint: Checkpoint, tensor: DenseTensor) -> DenseTensor:
    encoded = len(tensor.shape) == 2 and _is_float8(checkpoint, tensor.source)
    return replace(tensor, scales=tensor.source + SCALES) if encoded else tensor


def _is_float8(checkpoint: Checkpoint, name: str) -> bool:
    entry = checkpoint.tensors.get(name)
    return entry is not None and entry.dtype == _FLOAT8
