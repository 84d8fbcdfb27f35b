"""Encoder-decoders behind the same seams as all other models: workers compute their experts, and their keys and values
are paged.

The encoder reads the prompt of a request as a whole, in one step; its output is cached as the keys and values of every
cross-attention. The decoder begins in the same step, with the start token, whose logits are those of the first generated
token. batch.py describes the positions of both.

Shapes: S tokens of prompts, U rows of the decoder, D hidden size, H heads, d head size, n tokens of a prompt, N rows whose
logits are wanted, V vocabulary, P positions that can be served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families.encoder_decoder import EncoderDecoderModel
from moesaic.families.model import CrossAttention, DecoderAttention, EncoderAttention
from router.attention.paged import attend_group
from router.attention.plan import DecodeGroup
from router.attention.views import AttentionLayout
from router.cache.kv_cache import KVCache
from router.decoders.decoder import MicroBatch
from router.decoders.encoder_decoder.batch import DecoderRows, PromptRows
from router.decoders.encoder_decoder.positions import (
    bias_of_distances,
    bias_of_queries,
    prompt_positions,
    sinusoids,
)
from router.decoders.encoder_decoder.weights import SideLayer, SideReader
from router.decoders.residual_stream import ResidualStream
from router.gating.capacity import assign_with_capacity, run_lengths
from router.gating.gate import NO_SLOT, Assignment, Gate, assign_all
from router.gating.gate_stats import GateStats
from router.gating.model_view import ViewRows
from router.phase_clock import Phase, PhaseClock

# The queries of a prompt that are attended at once, where each has a bias of its own for every key.
_QUERIES_AT_ONCE = 256


@dataclass(slots=True, kw_only=True)
class _EncoderStream(ResidualStream):
    prompts: PromptRows


@dataclass(slots=True, kw_only=True)
class _DecoderStream(ResidualStream):
    rows: DecoderRows


class EncoderDecoder:
    """A RouterModel of a Switch Transformer or an NLLB-MoE."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: EncoderDecoderModel,
        layout: AttentionLayout,
        *,
        num_positions: int,
        clock: PhaseClock,
        limits_slots: bool,
    ) -> None:
        """`limits_slots`: whether experts have a capacity, and assignments beyond it are dropped."""
        self.layout = layout
        self.gate_stats = GateStats.of(model)
        self._arithmetic = model.arithmetic
        self._experts = model.experts
        self._limits_slots = limits_slots
        self._clock = clock
        self._num_encoder_layers = model.num_encoder_layers
        mixers = (model.mixers[0], model.mixers[model.num_encoder_layers])
        self._heads = tuple(_heads(mixer) for mixer in mixers)
        self._first_cross = model.num_layers
        reader = SideReader(checkpoint, model, layout)
        self._encoder, self._decoder = reader.sides()
        self._head = reader.head()
        self.weight_bytes = reader.num_bytes
        self._set_positions(num_positions, model.hidden_size)

    def _set_positions(self, num_positions: int, hidden_size: int) -> None:
        """Prepares the tables from which positions are looked up: biases of both sides, or sinusoids."""
        self._encoder_bias: torch.Tensor | None = None
        self._decoder_bias: torch.Tensor | None = None
        self._sinusoids: torch.Tensor | None = None
        relative = self._arithmetic.relative
        biases = (self._encoder.relative_bias, self._decoder.relative_bias)
        if relative is None:
            # Positions are counted from the id of the padding token, which itself has none.
            first = self._arithmetic.padding_token
            table = sinusoids(torch.arange(first, first + 1 + num_positions), hidden_size)
            table[0] = 0
            self._sinusoids = table.to(self.layout.device, self.layout.dtype)
            self.weight_bytes += self._sinusoids.nbytes
            return
        assert biases[0] is not None and biases[1] is not None
        self._encoder_bias = bias_of_distances(biases[0], relative, num_positions, both_ways=True)
        self._decoder_bias = bias_of_distances(biases[1], relative, num_positions, both_ways=False)
        self.weight_bytes += self._encoder_bias.nbytes + self._decoder_bias.nbytes

    @property
    def gates(self) -> dict[int, Gate]:
        """None whose input can be captured."""
        return {}

    @torch.inference_mode()
    def forward(self, micro_batches: Sequence[MicroBatch], cache: KVCache) -> torch.Tensor:
        """Runs a step, writes the cache, and returns the logits [N, V] of the wanted rows of each micro-batch in turn."""
        self.gate_stats.begin_step()
        for micro_batch in micro_batches:
            prompts = PromptRows.of(micro_batch.batch)
            if prompts.lengths:
                self._write_cross_attention(prompts, self.encode(micro_batch, prompts), cache)
        streams = [self._start(micro_batch) for micro_batch in micro_batches]
        for layer, weights in enumerate(self._decoder.layers, self._num_encoder_layers):
            for stream in streams:
                stream.add_layer_output()
                self._decode(layer, weights, stream, cache)
        for stream in streams:
            stream.add_layer_output()
        hidden = torch.cat([_wanted(stream) for stream in streams])
        return self._head(self._decoder.norm(hidden) * self._arithmetic.logits_scale)

    def encode(self, micro_batch: MicroBatch, prompts: PromptRows) -> torch.Tensor:
        """The encoder's output for the prompts, [S, D]."""
        hidden = self._embed(self._encoder.embedding, prompts.token_ids)
        if self._sinusoids is not None:
            positions = prompt_positions(prompts.token_ids, prompts.lengths, self._arithmetic.padding_token)
            hidden += self._sinusoids[positions]
        stream = _EncoderStream(
            micro_batch=micro_batch, hidden=hidden, tokens=prompts.tokens, prompts=prompts
        )
        for layer, weights in enumerate(self._encoder.layers):
            stream.add_layer_output()
            self._encode(layer, weights, stream)
        stream.add_layer_output()
        return self._encoder.norm(stream.hidden)

    def _encode(self, layer: int, weights: SideLayer, stream: _EncoderStream) -> None:
        """Computes a layer of the encoder up to the call of its experts, without waiting for their answer."""
        qkv = weights.attention.projections(weights.attention.norm(stream.hidden))
        with self._clock.phase(Phase.ATTENTION):
            num_heads, head_dim = self._heads[0]
            queries, keys, values = qkv.view(len(qkv), 3, num_heads, head_dim).unbind(1)
            attended = attend_prompts(
                queries, keys, values, stream.prompts.lengths, self._scaling(head_dim), self._encoder_bias
            )
        stream.hidden += weights.attention.output(attended)
        self._mix_channels(layer, weights, stream, stream.prompts.lengths)

    def _write_cross_attention(self, prompts: PromptRows, encoded: torch.Tensor, cache: KVCache) -> None:
        for layer, weights in enumerate(self._decoder.layers, self._first_cross):
            assert weights.cross is not None
            cache.write(layer, prompts.cache_positions, weights.cross.keys_values(encoded))

    def _start(self, micro_batch: MicroBatch) -> _DecoderStream:
        rows = DecoderRows.of(
            micro_batch.batch,
            self.layout,
            start_token=self._arithmetic.start_token,
            bias=self._decoder_bias,
        )
        hidden = self._embed(self._decoder.embedding, rows.token_ids)
        if self._sinusoids is not None:
            counted = rows.token_ids != self._arithmetic.padding_token
            hidden += self._sinusoids[(rows.positions + 1) * counted]
        return _DecoderStream(micro_batch=micro_batch, hidden=hidden, tokens=rows.tokens, rows=rows)

    def _decode(self, layer: int, weights: SideLayer, stream: _DecoderStream, cache: KVCache) -> None:
        """Computes a layer of the decoder up to the call of its experts, without waiting for their answer."""
        assert weights.cross is not None
        rows, (num_heads, head_dim) = stream.rows, self._heads[1]
        qkv = weights.attention.projections(weights.attention.norm(stream.hidden))
        cache.write(layer, rows.cache_positions, qkv[:, num_heads * head_dim :])
        queries = qkv[:, : num_heads * head_dim].unflatten(1, (num_heads, head_dim))
        stream.hidden += weights.attention.output(self._attend(layer, queries, rows.self_attention, cache))
        queries = weights.cross.queries(weights.cross.norm(stream.hidden)).unflatten(1, (num_heads, head_dim))
        crossing = self._first_cross + layer - self._num_encoder_layers
        stream.hidden += weights.cross.output(self._attend(crossing, queries, rows.cross_attention, cache))
        # Each row counts as a sequence of its own, as when it was generated: so the result is the same when a preempted
        # sequence starts over.
        self._mix_channels(layer, weights, stream, (1,) * len(rows.tokens))

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

    def _mix_channels(
        self, layer: int, weights: SideLayer, stream: ResidualStream, lengths: Sequence[int]
    ) -> None:
        """Computes the MLP of a layer or calls its experts. `lengths`: how many consecutive rows a capacity counts as one
        sequence."""
        normed = weights.mlp_norm(stream.hidden)
        if weights.mlp is not None:
            stream.local_output = weights.mlp(normed)
            return
        assignment = (
            assign_all(normed)
            if weights.gate is None
            else self._assign(layer, weights.gate, normed, stream.views, lengths)
        )
        stream.call = stream.micro_batch.experts.send(
            layer, normed, assignment.slots, assignment.weights, tokens=stream.tokens
        )

    def _assign(
        self,
        layer: int,
        gate: Gate,
        normed: torch.Tensor,
        views: Sequence[ViewRows],
        lengths: Sequence[int],
    ) -> Assignment:
        with self._clock.phase(Phase.GATE):
            if self.gate_stats.sampling:
                self.gate_stats.record_logits(layer, gate.logits(normed))
            capacity = self._experts[layer].capacity if self._limits_slots else None
            if capacity is None:
                assignment = gate.assign_views(layer, normed, views)
            else:
                assignment, num_dropped = assign_with_capacity(
                    gate.logits(normed), gate.rule, capacity, run_lengths(capacity, lengths)
                )
                num_kept = int((assignment.slots != NO_SLOT).sum())
                self.gate_stats.record_dropped(layer, num_kept + num_dropped, num_dropped)
        return assignment

    def _embed(self, embedding: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        return functional.embedding(token_ids, embedding) * self._arithmetic.embedding_scale

    def _scaling(self, head_dim: int) -> float:
        """The factor of attention scores. With relative positions there is none: the weights were trained without it."""
        return head_dim**-0.5 if self._arithmetic.relative is None else 1.0


def attend_prompts(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: Sequence[int],
    scaling: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Every token attends to the whole of its prompt: [S, H, d] -> [S, H * d]. `bias` [H, 2 P - 1] is by distance."""
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


def _wanted(stream: _DecoderStream) -> torch.Tensor:
    """The decoder's rows whose logits are wanted."""
    wanted = stream.rows.index_of(stream.micro_batch.rows.tolist())
    if wanted == list(range(len(stream.hidden))):
        return stream.hidden
    return stream.hidden.index_select(0, torch.tensor(wanted, dtype=torch.long).to(stream.hidden.device))


def _heads(mixer: object) -> tuple[int, int]:
    assert isinstance(mixer, EncoderAttention | DecoderAttention | CrossAttention)
    return mixer.num_heads, mixer.head_dim
