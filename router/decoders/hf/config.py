"""The config from which transformers builds the modules of a checkpoint: that of its file, without the keys that must
have no effect here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.errors import CheckpointError, InvalidArgument, Unsupported
from moesaic.families.model import MoeModel

# References to third-party code, and the packing of weights on disk: tensors are decoded before the modules see them.
_DROPPED = frozenset({"auto_map", "quantization_config"})
# Switches off everything that a forward pass would compute in addition to logits.
_LOGITS_ONLY = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "use_cache": False,
}


def modules_config(checkpoint: Checkpoint, model: MoeModel, num_positions: int) -> PreTrainedConfig:
    """The config for sequences of at most `num_positions` tokens. Raises CheckpointError, InvalidArgument, Unsupported."""
    given = checkpoint.config if model.transformers_config is None else model.transformers_config
    values = {key: value for key, value in given.items() if key not in _DROPPED}
    family = values.pop("model_type")
    if family not in CONFIG_MAPPING:
        raise Unsupported(f"model: transformers has no modules of {family}", field="model")
    with blaming_config(checkpoint):
        text: PreTrainedConfig = (
            CONFIG_MAPPING[family].from_dict(values | _LOGITS_ONLY).get_text_config(decoder=True)
        )
    _check_positions(text, num_positions)
    return text


@contextmanager
def blaming_config(checkpoint: Checkpoint) -> Iterator[None]:
    """Turns any error that transformers raises while it reads the config into a CheckpointError about the config."""
    try:
        yield
    except Exception as error:  # transformers checks few values, so a wrong one may raise anything
        field = checkpoint.config_file
        message = f"{field}: transformers refuses it: {type(error).__name__}: {error}"
        raise CheckpointError(message, field=field) from error


def _check_positions(config: PreTrainedConfig, num_positions: int) -> None:
    """Refuses lengths beyond which the result of a sequence would depend on its neighbours: some rotary positions change
    for all tokens of a batch as soon as one sequence of it exceeds a certain length."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type")
    limit = {
        "dynamic": config.max_position_embeddings,
        "longrope": parameters.get("original_max_position_embeddings"),
    }.get(str(kind))
    if limit is not None and num_positions > limit:
        raise InvalidArgument(
            f"max_model_len: {kind} positions change beyond {limit} tokens, which is not served",
            field="max_model_len",
        )
