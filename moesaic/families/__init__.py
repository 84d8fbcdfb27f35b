"""Describes the model of a checkpoint. This is the only place that lists all families.

A model whose config and tensors disagree is refused here, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Callable

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families import (
    deepseek,
    generic,
    glm4_moe,
    gpt_oss,
    granitemoe,
    llama4,
    mistral,
    mixtral,
    nllb_moe,
    olmoe,
    phi,
    phimoe,
    qwen_moe,
    stripedhyena,
    switch_transformers,
)
from moesaic.families.config import Config
from moesaic.families.defaults import DEFAULTS
from moesaic.families.model import DenseLayers, MoeModel
from moesaic.families.quantisation import in_float8, read_encoding
from moesaic.families.tensor_check import check_tensors
from moesaic.families.ties import resolve_ties

__all__ = ["DenseLayers", "MoeModel", "describe_model"]

Describe = Callable[[Checkpoint, Config], MoeModel]

_FAMILIES: dict[str, Describe] = {
    "deepseek_v2": deepseek.describe_v2,
    "deepseek_v3": deepseek.describe_v3,
    "flex_olmo": olmoe.describe_flex_olmo,
    "glm4_moe": glm4_moe.describe,
    "gpt_oss": gpt_oss.describe,
    "granitemoe": granitemoe.describe,
    "llama4": llama4.describe_folder,
    "llama4_text": llama4.describe_text,
    "llama": mistral.describe_llama,
    "ministral": mistral.describe_ministral,
    "mistral": mistral.describe,
    "mixtral": mixtral.describe,
    nllb_moe.FAMILY: nllb_moe.describe,
    "olmoe": olmoe.describe_olmoe,
    "phi": phi.describe,
    "phi-msft": phi.describe_old,
    "phimoe": phimoe.describe,
    "qwen2_moe": qwen_moe.describe_qwen2,
    "qwen3_moe": qwen_moe.describe_qwen3,
    stripedhyena.FAMILY: stripedhyena.describe,
    switch_transformers.FAMILY: switch_transformers.describe,
    **dict.fromkeys(generic.NAMES, generic.describe),
}


def describe_model(checkpoint: Checkpoint, dense_layers: DenseLayers = "auto") -> MoeModel:
    """The model of the checkpoint, with its dense layers computed where the setting says.

    Raises CheckpointError, which names the config key or the tensor at fault.
    """
    family = checkpoint.config.get("model_type")
    describe = _FAMILIES.get(family) if isinstance(family, str) else None
    config = Config(
        checkpoint.config,
        file=checkpoint.config_file,
        spelling=checkpoint.spelling,
        # A config in Mistral's format is complete, and its defaults are others.
        defaults=None if checkpoint.in_mistral_format else DEFAULTS.get(str(family)),
    )
    if describe is None:
        generic.refuse_unserved(config)
        supported = ", ".join(sorted(_FAMILIES))
        config.fail("model_type", f"{str(family)[:64]!r} is not served; supported: {supported}")
    encoding = read_encoding(config)
    model = resolve_ties(checkpoint, describe(checkpoint, config))
    if encoding == "fp8_block":
        model = in_float8(checkpoint, model)
    check_tensors(checkpoint, model)
    return model.placing(dense_layers)
