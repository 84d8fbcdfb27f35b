"""Checkpoints with quantised weights: which encodings are supported, and which tensors are encoded.

Weights are decoded when they are loaded; all computation uses the dtype of the tensors that are not encoded.
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
# The suffix of the name of a float8 tensor's factors.
SCALES = "_scale_inv"
_ENCODED = frozenset({_FLOAT8, "U8"})
_EMBEDDING = "model.embed_tokens.weight"


def read_encoding(config: Config) -> Encoding:
    """The encoding of weights that the config states. An unknown one is refused by name."""
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
    """The dtype of a decoded weight: its own or, if it is encoded, that of the embedding, which never is."""
    entry = checkpoint.tensors.get(name)
    return stored_dtype(checkpoint, embedding if entry is not None and entry.dtype in _ENCODED else name)


def in_float8(checkpoint: Checkpoint, model: MoeModel) -> MoeModel:
    """The same model, with the scales of all tensors that this checkpoint stores as float8."""
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
