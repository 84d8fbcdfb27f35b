"""The views of a model's layers: which tokens of its sequence a token sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moesaic.families.model import Attention, LatentAttention, Mixer


@dataclass(frozen=True, slots=True)
class View:
    """What a token sees of its sequence: the last `window` tokens, its own included; within its own chunk of
    `chunk` positions. None stands for no such bound."""

    window: int | None = None
    chunk: int | None = None

    def origin(self, position: int) -> int:
        """The first position of the chunk that a position is in."""
        return 0 if self.chunk is None else position - position % self.chunk

    def first(self, position: int) -> int:
        """The first position that the token at `position` sees."""
        origin = self.origin(position)
        return origin if self.window is None else max(origin, position + 1 - self.window)


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """How the attention of one model is laid out: its views, blocks, device and dtype. Layers with the same
    view share it: `view_of` maps each layer that attends to an index in `views`. Encoder-decoders plan by
    themselves (see encoder_decoder/batch.py) and have no views here."""

    block_tokens: int
    views: tuple[View, ...]
    view_of: Mapping[int, int]
    device: torch.device
    dtype: torch.dtype
    # Whether every row is attended by itself, in a shape that its own position alone decides.
    invariant: bool = False

    @classmethod
    def of(
        cls,
        mixers: Sequence[Mixer],
        *,
        block_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        invariant: bool = False,
    ) -> AttentionLayout:
        """The layout of a model with these mixers, one a layer."""
        views = {
            layer: _view(mixer)
            for layer, mixer in enumerate(mixers)
            if isinstance(mixer, Attention | LatentAttention)
        }
        index_of = {view: index for index, view in enumerate(dict.fromkeys(views.values()))}
        view_of = {layer: index_of[view] for layer, view in views.items()}
        return cls(block_tokens, tuple(index_of), view_of, device, dtype, invariant)


def _view(mixer: Mixer) -> View:
    return View(mixer.window, mixer.chunk) if isinstance(mixer, Attention) else View()
