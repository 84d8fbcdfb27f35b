"""Encoder-decoders behind the same seams as all other models: their experts elsewhere, their keys and values paged.

A request's prompt is what the encoder reads, in one step and as a whole; what it makes of it lies in the cache as the keys
and values of every cross-attention. The decoder begins in the same step, with the start token: its logits are those of
the first token that is generated. See two_sided_batch.py for who stands where.

Shapes: S tokens of prompts, U rows of the decoder, D hidden size, H heads, d head size, n tokens of a prompt, N rows whose
logits are wanted, V vocabulary, P positions that can be served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families import nllb_moe, switch_transformers
from moesaic.families.config import Config
from moesaic.families.encoder_decoder import Arithmetic
from moesaic.families.model import CrossAttention, DecoderAttention, EncoderAttention, MoeModel
from router.attention.paged import attend_group
from router.attention.plan import DecodeGroup
from router.attention.views import Layout
from router.cache.kv_cache import KVCache
from router.decoders.decoder import MicroBatch
from router.decoders.encoder_decoder.batch import DecoderRows, PromptRows
from router.decoders.encoder_decoder.positions import (
    bias_of_distances,
    bias_of_queries,
    prompt_places,
    sinusoids,
)
from router.decoders.encoder_decoder.weights import Layer, Reader
from router.decoders.residual_stream import Flight
from router.gating.capacity import assign_within, runs
from router.gating.gate import NO_SLOT, Assignment, assign
from router.gating.gate_stats import GateHealth
from router.phase_clock import Phase, PhaseClock

_FAMILIES = {family.FAMILY: family for family in (nllb_moe, switch_transformers)}
# Of a prompt, where each has a bias of its own for every key.
_QUERIES_AT_ONCE = 256


@dataclass(slots=True, kw_only=True)
class _Reading(Flight):
    """A micro-batch's prompts on their way through the encoder."""

    prompts: PromptRows


@dataclass(slots=True, kw_only=True)
class _Answering(Flight):
    """A micro-batch on its way through the decoder."""

    rows: DecoderRows


class EncoderDecoder:
    """A RouterModel of a Switch Transformer or an NLLB-MoE."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: MoeModel,
        layout: Layout,
        *,
        num_positions: int,
        clock: PhaseClock,
        limits_slots: bool,
    ) -> None:
        """`limits_slots`: whether experts have their capacity, and what is beyond it is dropped."""
        self.layout = layout
        self.gates = GateHealth.of(model)
        family = _FAMILIES[model.family]
        self._arithmetic: Arithmetic = family.read_arithmetic(Config(checkpoint.config))
        self._experts = model.experts
        self._limits_slots = limits_slots
        self._clock = clock
        self._num_encoder_layers = model.num_encoder_layers
        mixers = (model.mixers[0], model.mixers[model.num_encoder_layers])
        self._heads = tuple(_heads(mixer) for mixer in mixers)
        self._first_cross = model.num_layers
        reader = Reader(checkpoint, model, family.NAMES, self._arithmetic, layout)
        self._encoder, self._decoder = reader.sides()
        self._head = reader.head(self._decoder)
        self.weight_bytes = reader.num_bytes
        self._set_positions(num_positions, model.hidden_size)

    def _set_positions(self, num_positions: int, hidden_size: int) -> None:
        """Looked up, never computed."""
        self._both_ways: torch.Tensor | None = None
        self._backwards: torch.Tensor | None = None
        self._places: torch.Tensor | None = None
        relative = self._arithmetic.relative
        biases = (self._encoder.relative_bias, self._decoder.relative_bias)
        if relative is None:
            # Counted from the id of the padding token, which itself has no place.
            first = self._arithmetic.padding_token
            places = sinusoids(torch.arange(first, first + 1 + num_positions), hidden_size)
            places[0] = 0
            self._places = places.to(self.layout.device, self.layout.dtype)
            self.weight_bytes += self._places.nbytes
            return
        assert biases[0] is not None and biases[1] is not None
        self._both_ways = bias_of_distances(biases[0], relative, num_positions, both_ways=True)
        self._backwards = bias_of_distances(biases[1], relative, num_positions, both_ways=False)
        self.weight_bytes += self._both_ways.nbytes + self._backwards.nbytes

    @torch.inference_mode()
    def forward(self, parts: Sequence[MicroBatch], cache: KVCache) -> torch.Tensor:
        """Runs a step, writes the cache, and gives the logits [N, V] of the wanted rows, part by part."""
        self.gates.begin_step()
        for part in parts:
            prompts = PromptRows.of(part.batch)
            if prompts.lengths:
                self._write_crossings(prompts, self.encode(part, prompts), cache)
        flights = [self._start(part) for part in parts]
        for layer, weights in enumerate(self._decoder.layers, self._num_encoder_layers):
            for flight in flights:
                flight.land()
                self._decode(layer, weights, flight, cache)
        for flight in flights:
            flight.land()
        hidden = torch.cat([_wanted(flight) for flight in flights])
        return self._head(self._decoder.norm(hidden) * self._arithmetic.logits_scale)

    def encode(self, part: MicroBatch, prompts: PromptRows) -> torch.Tensor:
        """What the encoder makes of the prompts, [S, D]."""
        hidden = self._embed(self._encoder.embedding, prompts.token_ids)
        if self._places is not None:
            places = prompt_places(prompts.token_ids, prompts.lengths, self._arithmetic.padding_token)
            hidden += self._places[places]
        flight = _Reading(part=part, hidden=hidden, tokens=prompts.tokens, prompts=prompts)
        for layer, weights in enumerate(self._encoder.layers):
            flight.land()
            self._read(layer, weights, flight)
        flight.land()
        return self._encoder.norm(flight.hidden)

    def _read(self, layer: int, weights: Layer, flight: _Reading) -> None:
        """A layer of the encoder up to its experts, which are asked and not waited for."""
        qkv = weights.attention.projections(weights.attention.norm(flight.hidden))
        with self._clock.phase(Phase.ATTENTION):
            num_heads, head_dim = self._heads[0]
            queries, keys, values = qkv.view(len(qkv), 3, num_heads, head_dim).unbind(1)
            attended = attend_prompts(
                queries, keys, values, flight.prompts.lengths, self._scaling(head_dim), self._both_ways
            )
        flight.hidden += weights.attention.output(attended)
        self._ask(layer, weights, flight, flight.prompts.lengths)

    def _write_crossings(self, prompts: PromptRows, encoded: torch.Tensor, cache: KVCache) -> None:
        for place, weights in enumerate(self._decoder.layers):
            assert weights.cross is not None
            cache.write(self._first_cross + place, prompts.cache_positions, weights.cross.sources(encoded))

    def _start(self, part: MicroBatch) -> _Answering:
        rows = DecoderRows.of(
            part.batch, self.layout, start_token=self._arithmetic.start_token, bias=self._backwards
        )
        hidden = self._embed(self._decoder.embedding, rows.token_ids)
        if self._places is not None:
            counts = rows.token_ids != self._arithmetic.padding_token
            hidden += self._places[(rows.places + 1) * counts]
        return _Answering(part=part, hidden=hidden, tokens=rows.tokens, rows=rows)

    def _decode(self, layer: int, weights: Layer, flight: _Answering, cache: KVCache) -> None:
        """A layer of the decoder up to its experts, which are asked and not waited for."""
        assert weights.cross is not None
        rows, (num_heads, head_dim) = flight.rows, self._heads[1]
        qkv = weights.attention.projections(weights.attention.norm(flight.hidden))
        cache.write(layer, rows.cache_positions, qkv[:, num_heads * head_dim :])
        queries = qkv[:, : num_heads * head_dim].unflatten(1, (num_heads, head_dim))
        flight.hidden += weights.attention.output(self._attend(layer, queries, rows.own, cache))
        queries = weights.cross.queries(weights.cross.norm(flight.hidden)).unflatten(1, (num_heads, head_dim))
        crossing = self._first_cross + layer - self._num_encoder_layers
        flight.hidden += weights.cross.output(self._attend(crossing, queries, rows.cross, cache))
        # Each row for itself, as when it was generated: the same whenever a sequence has to start over.
        self._ask(layer, weights, flight, (1,) * len(rows.tokens))

    def _attend(
        self, layer: int, queries: torch.Tensor, groups: Sequence[DecodeGroup], cache: KVCache
    ) -> torch.Tensor:
        """[U, H, d] -> [U, H * d]"""
        with self._clock.phase(Phase.ATTENTION):
            attended = queries.new_empty(len(queries), queries[0].numel())
            scaling = self._scaling(queries.shape[2])
            for group in groups:
                attended[group.rows] = attend_group(layer, queries[group.rows], group, cache, scaling)
            return attended

    def _ask(self, layer: int, weights: Layer, flight: Flight, lengths: Sequence[int]) -> None:
        """`lengths`: how many consecutive rows are counted as one sequence, where slots can be full."""
        normed = weights.mlp_norm(flight.hidden)
        if weights.mlp is not None:
            flight.beside = weights.mlp(normed)
            return
        assignment = self._assign(layer, weights, normed, lengths)
        flight.call = flight.part.experts.send(
            layer, normed, assignment.slots, assignment.weights, tokens=flight.tokens
        )

    def _assign(self, layer: int, weights: Layer, normed: torch.Tensor, lengths: Sequence[int]) -> Assignment:
        experts = self._experts[layer]
        if weights.scorer is None or experts.gate is None:
            one_slot = (len(normed), 1)
            return Assignment(
                torch.ones(one_slot, device=normed.device),
                torch.zeros(one_slot, dtype=torch.long, device=normed.device),
            )
        with self._clock.phase(Phase.GATE):
            logits = weights.scorer(normed)
            if self.gates.looks:
                self.gates.look(layer, logits)
            if self._limits_slots and experts.capacity is not None:
                assignment, num_dropped = assign_within(
                    logits, experts.gate, experts.capacity, runs(experts.capacity, lengths)
                )
                num_kept = int((assignment.slots != NO_SLOT).sum())
                self.gates.count(layer, num_kept + num_dropped, num_dropped)
            else:
                assignment = assign(logits, experts.gate)
        return assignment

    def _embed(self, embedding: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        return functional.embedding(token_ids, embedding) * self._arithmetic.embedding_scale

    def _scaling(self, head_dim: int) -> float:
        """Where scores are biased, weights have been trained to scale them."""
        return head_dim**-0.5 if self._arithmetic.relative is None else 1.0


def attend_prompts(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: Sequence[int],
    scaling: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Each prompt over all of itself: [S, H, d] -> [S, H * d]. `bias` [H, 2 P - 1], by distance."""
    attended = torch.empty_like(queries)
    first = 0
    for length in lengths:
        of_prompt = slice(first, first + length)
        q, k, v = (rows[of_prompt].transpose(0, 1)[None] for rows in (queries, keys, values))
        output = attended[of_prompt].transpose(0, 1)
        at_once = length if bias is None else _QUERIES_AT_ONCE
        for start in range(0, length, at_once):
            some = slice(start, min(start + at_once, length))
            mask = None if bias is None else bias_of_queries(bias, some, length)[None]
            output[:, some] = functional.scaled_dot_product_attention(
                q[:, :, some], k, v, attn_mask=mask, scale=scaling
            )[0]
        first += length
    return attended.flatten(1)


def _wanted(flight: _Answering) -> torch.Tensor:
    """Of the decoder's rows, those whose logits are wanted."""
    wanted = flight.rows.index_of(flight.part.rows.tolist())
    if wanted == list(range(len(flight.hidden))):
        return flight.hidden
    return flight.hidden.index_select(0, torch.tensor(wanted, dtype=torch.long).to(flight.hidden.device))


def _heads(mixer: object) -> tuple[int, int]:
    assert isinstance(mixer, EncoderAttention | DecoderAttention | CrossAttention)
    return mixer.num_heads, mixer.head_dim
