"""Our own decoder: what transformers computes, with as few operations as that takes.

One product gives queries, keys and values; keys and values go to the cache as they come out of it; weights lie as they
are read; positions are looked up, never computed. Several micro-batches pass the layers in turn, so that one is here
while the workers have the other.

Rotary positions turn pairs of numbers. Checkpoints keep the two of a pair half a head apart; the rows of the query and
key weights are laid out anew, pairs side by side, so that turning is one complex product. Scores stay the same.

Shapes: T tokens, D hidden size, H query heads, G key/value heads, d head size, N rows whose logits are wanted, V
vocabulary, P positions that can be served.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial

import torch
from torch.nn import functional

from moesaic.checkpoint import Checkpoint
from moesaic.errors import CheckpointError
from moesaic.families import MoeModel
from moesaic.linear import Linear
from router.attention import attend
from router.batch import Layout
from router.decoder_layout import DecoderLayout, LayerTensors
from router.dense_tensors import dense_names, read_dense
from router.dispatcher import LayerCall
from router.gate import assign
from router.kv_cache import KVCache
from router.model import MicroBatch
from router.phases import PhaseClock


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: torch.Tensor  # [D]
    qkv: Linear  # D -> (H + 2 G) * d
    output: Linear  # H * d -> D
    experts_norm: torch.Tensor  # [D]
    gate: Callable[[torch.Tensor], torch.Tensor]  # D -> E


@dataclass(slots=True)
class _Flight:
    """A micro-batch on its way through the layers."""

    part: MicroBatch
    hidden: torch.Tensor  # [T, D]
    turns: torch.Tensor  # [T, 1, d / 2], complex: how far each position turns each pair
    # Of the tokens, those that `hidden` still has; None: all.
    tokens: list[int] | None = None
    call: LayerCall | None = None

    def land(self) -> None:
        """Adds what the experts were asked for last."""
        if self.call is not None:
            self.hidden += self.part.experts.receive(self.call)
            self.call = None

    def keep_wanted(self, attended: torch.Tensor) -> torch.Tensor:
        """In the last layer keys and values are written, and nothing looks any more at tokens without wanted logits.
        Drops those, also of `attended`."""
        rows = self.part.rows.tolist()
        if rows != list(range(len(attended))):
            self.tokens = rows
            index = self.part.rows.to(attended.device)
            self.hidden, attended = self.hidden[index], attended[index]
        return attended


class LeanDecoder:
    """A RouterModel of the decoder that `DecoderLayout` describes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        shape: MoeModel,
        decoder: DecoderLayout,
        layout: Layout,
        *,
        num_positions: int,
        clock: PhaseClock,
    ) -> None:
        self.layout = layout
        self._shape = shape
        self._clock = clock
        self._norm_eps = decoder.norm_eps
        self._scaling = shape.head_dim**-0.5
        reader = _Reader(checkpoint, shape, decoder, layout)
        self._layers = tuple(reader.layer(names) for names in decoder.layers)
        self._embedding, self._norm, self._head = reader.ends()
        self._turns = rotary_turns(num_positions, shape.head_dim, decoder.rope_theta).to(layout.device)
        self.weight_bytes = reader.num_bytes + self._turns.nbytes

    @torch.inference_mode()
    def forward(self, parts: Sequence[MicroBatch], cache: KVCache) -> torch.Tensor:
        """Runs a step, writes the cache, and gives the logits [N, V] of the wanted rows, part by part."""
        flights = [self._start(part) for part in parts]
        for index, layer in enumerate(self._layers):
            for flight in flights:
                flight.land()
                self._run(index, layer, flight, cache)
        for flight in flights:
            flight.land()
        hidden = flights[0].hidden if len(flights) == 1 else torch.cat([flight.hidden for flight in flights])
        return self._head(self._normed(hidden, self._norm))

    def _start(self, part: MicroBatch) -> _Flight:
        hidden = functional.embedding(part.batch.token_ids[0], self._embedding)
        return _Flight(part, hidden, self._turns[part.batch.positions[0]])

    def _run(self, index: int, layer: _Layer, flight: _Flight, cache: KVCache) -> None:
        """A layer up to its experts, which are asked and not waited for."""
        qkv = layer.qkv(self._normed(flight.hidden, layer.attention_norm))
        attended = self._attend(index, qkv, flight, cache)
        if index == len(self._layers) - 1:
            attended = flight.keep_wanted(attended)
            if not len(attended):
                return
        hidden = flight.hidden
        hidden += layer.output(attended)
        normed = self._normed(hidden, layer.experts_norm)
        started = time.perf_counter()
        assignment = assign(layer.gate(normed), self._shape.gate)
        self._clock.add("gate", time.perf_counter() - started)
        flight.call = flight.part.experts.send(
            index, normed, assignment.slots, assignment.weights, tokens=flight.tokens
        )

    def _attend(self, index: int, qkv: torch.Tensor, flight: _Flight, cache: KVCache) -> torch.Tensor:
        """qkv [T, (H + 2 G) * d] -> [T, H * d]; turns queries and keys where they are."""
        started = time.perf_counter()
        shape, batch = self._shape, flight.part.batch
        num_turned = shape.num_heads + shape.num_kv_heads
        heads = qkv.view(len(qkv), -1, shape.head_dim)
        turn_(heads[:, :num_turned], flight.turns)
        cache.write(index, batch.cache_positions, qkv[:, shape.num_heads * shape.head_dim :])
        attended = attend(index, heads[:, : shape.num_heads], batch, cache, self._scaling)
        self._clock.add("attention", time.perf_counter() - started)
        return attended

    def _normed(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, self._norm_eps)


class _Reader:
    """Reads the weights of one layer after the other and lays each out for its use; nothing is held twice."""

    def __init__(
        self, checkpoint: Checkpoint, shape: MoeModel, decoder: DecoderLayout, layout: Layout
    ) -> None:
        self.num_bytes = 0
        self._checkpoint = checkpoint
        self._shape = shape
        self._decoder = decoder
        self._layout = layout
        # Tied: some checkpoints carry the head's copy of the embedding all the same.
        strangers = dense_names(checkpoint, shape) - decoder.names - {"lm_head.weight"}
        if strangers:
            name = min(strangers)
            raise CheckpointError(f"tensor {name} is not part of the model", field=name)

    def layer(self, names: LayerTensors) -> _Layer:
        tensors = self._read(*astuple(names))
        head_dim = self._shape.head_dim
        qkv = (
            pairs_side_by_side(tensors[names.query], head_dim),
            pairs_side_by_side(tensors[names.key], head_dim),
            tensors[names.value],
        )
        return _Layer(
            attention_norm=tensors[names.attention_norm],
            qkv=self._linear(torch.cat(qkv)),
            output=self._linear(tensors[names.output]),
            experts_norm=tensors[names.experts_norm],
            gate=self._gate(tensors[names.gate]),
        )

    def ends(self) -> tuple[torch.Tensor, torch.Tensor, Linear]:
        """Embedding, last norm, head. Tied ones are one tensor, except where a product wants a layout of its own:
        then they are held in both forms, which costs memory and makes the head 1.6 to 4 times as fast."""
        decoder = self._decoder
        tensors = self._read(decoder.embedding, decoder.norm, decoder.head)
        head = self._linear(tensors[decoder.head])
        if decoder.head == decoder.embedding and self._layout.device.type == "cpu":
            self.num_bytes += head.num_bytes
        return tensors[decoder.embedding], tensors[decoder.norm], head

    def _read(self, *names: str) -> dict[str, torch.Tensor]:
        layout = self._layout
        tensors = dict(
            read_dense(self._checkpoint, frozenset(names), dtype=layout.dtype, device=layout.device)
        )
        self.num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        return tensors

    def _linear(self, weight: torch.Tensor) -> Linear:
        return Linear(weight, batch_invariant=self._layout.invariant)

    def _gate(self, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        if self._layout.invariant:
            return self._linear(weight)
        # Small enough that the plain product is the faster one.
        return partial(functional.linear, weight=weight)


def pairs_side_by_side(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows [h * d, D] of queries or keys: in each head, those of a rotary pair next to each other."""
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def rotary_turns(num_positions: int, head_dim: int, theta: float) -> torch.Tensor:
    """[P, 1, d / 2] complex: cosine and sine of the angles, with the very operations of transformers."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return torch.complex(angles.cos(), angles.sin())[:, None]


def turn_(heads: torch.Tensor, turns: torch.Tensor) -> None:
    """Turns heads [T, h, d] in place, in float32."""
    pairs = heads.view(*heads.shape[:2], -1, 2)
    if heads.dtype == torch.float32:
        torch.view_as_complex(pairs).mul_(turns)
    else:
        pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * turns))
