"""How the steps of one model are laid out: which tokens each of its layers sees, and what its tensors are like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moesaic.families.model import Attention, LatentAttention, Mixer


@dataclass(frozen=True, slots=True)
class View:
    """What a token sees of its sequence: `window` tokens, its own included; the tokens of its own chunk of `chunk`
    positions. None: all before it."""

    window: int | None = None
    chunk: int | None = None

    def origin(self, place: int) -> int:
        """Where the chunk of that position begins."""
        return 0 if self.chunk is None else place - place % self.chunk

    def first(self, place: int) -> int:
        """The first position that the token at `place` sees."""
        origin = self.origin(place)
        return origin if self.window is None else max(origin, place + 1 - self.window)


@dataclass(frozen=True, slots=True)
class Layout:
    """How the steps of one model are laid out. Layers that see alike share a view: `view_of` has the index in `views`
    of every layer that has one: encoder-decoders lay out their own (see decoders/encoder_decoder/batch.py)."""

    block_tokens: int
    views: tuple[View, ...]
    view_of: Mapping[int, int]
    device: torch.device
    dtype: torch.dtype
    # Every row is attended by itself, in a shape that its own position decides.
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
    ) -> Layout:
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
