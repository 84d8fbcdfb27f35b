"""The attention seam of transformers: the modules compute queries, keys and values, and paged attention does the rest.

Windows, chunks and masks come from the batch, which follows the model's mixers. Any other argument that a family passes to
its attention function is refused by name if it is not known here: it would change the arithmetic.

Shapes: T tokens, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from moesaic.errors import Unsupported
from moesaic.families.model import Attention, Mixer
from router.attention.packed_batch import PackedBatch
from router.attention.paged import attend
from router.cache.kv_cache import KVCache
from router.phase_clock import Phase, PhaseClock

ATTENTION_NAME = "moesaic_paged"

# Arguments whose content the batch already has, and those that only training or other caches need.
_IGNORED = frozenset({
    "attention_mask", "cache_position", "cache_params", "dropout", "is_causal", "output_attentions",
    "output_hidden_states", "output_router_logits", "position_ids", "return_dict", "use_cache",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """The step as attention sees it. It reaches `paged_attention` as an argument of the model's forward."""

    batch: PackedBatch
    cache: KVCache
    mixers: tuple[Mixer, ...]
    clock: PhaseClock


@dataclass(frozen=True, slots=True)
class Temperature:
    """The temperature of Llama-4: in layers without rotary positions, queries are scaled up with their position."""

    scale: float
    floor: float

    def of(self, positions: torch.Tensor) -> torch.Tensor:
        """[T] -> [T], float32."""
        return torch.log1p(torch.floor((positions.float() + 1) / self.floor)) * self.scale + 1


def register_attention() -> None:
    """Registers the seam with transformers; may be called any number of times."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    # The batch has the masks, so the model builds none.
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *_, **__: None)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    step: AttentionStep,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, d], key and value [1, G, T, d], s_aux [H] -> ([1, T, H, d], None)."""
    with step.clock.phase(Phase.ATTENTION):
        layer: int = module.layer_idx  # type: ignore[assignment]
        _check_arguments(step.mixers[layer], sliding_window, s_aux, others)
        rows = torch.cat((key, value), dim=1)[0].transpose(0, 1).flatten(1)
        step.cache.write(layer, step.batch.cache_positions, rows)
        queries = query[0].transpose(0, 1).contiguous()
        temperature: Temperature | None = getattr(module, "temperature", None)
        if temperature is not None:
            queries = (queries * temperature.of(step.batch.positions[0])[:, None, None]).to(queries.dtype)
        output = attend(layer, queries, step.batch, step.cache, scaling, s_aux)
    return output[None], None


def _check_arguments(
    mixer: Mixer, sliding_window: int | None, sinks: torch.Tensor | None, others: dict[str, Any]
) -> None:
    if not isinstance(mixer, Attention) or (sinks is not None) != mixer.sinks:
        raise _unknown("s_aux")
    if sliding_window is not None and sliding_window != mixer.window:
        raise _unknown("sliding_window")
    for name, value in others.items():
        if value is not None and name not in _IGNORED:
            raise _unknown(name)


def _unknown(argument: str) -> Unsupported:
    return Unsupported(f"model: its attention wants {argument}, which is not known here", field="model")
