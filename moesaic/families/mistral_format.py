"""The format of Mistral's own releases: other tensor names, and queries and keys in interleaved rotary order.

The torrent of December 2023 and later releases have a tensor for every weight of every expert; the first upload has all
experts of a layer in one tensor.

Shapes: D hidden size, F inner size, E slots.
"""

from __future__ import annotations

from dataclasses import replace

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families import blocks
from moesaic.families.config import Config
from moesaic.families.decoder import DecoderSizes, SizeCheck
from moesaic.families.model import Attention, DenseTensor, Mixer, MoeModel, WeightPattern
from moesaic.families.tensor_check import check_num_layers

LAYER = "layers.{layer}."
DENSE = blocks.separate(LAYER + "feed_forward.", "w1", "w3", "w2")
SEPARATE = blocks.separate(LAYER + "feed_forward.experts.{slot}.", "w1", "w3", "w2")
# The files store these tensors as [E * F, D]; they are described here as [E, F, D], which has the same order.
STACKED = {
    "gate": WeightPattern(LAYER + "block_sparse_moe.w1", stacked=True),
    "up": WeightPattern(LAYER + "block_sparse_moe.w3", stacked=True),
    "down": WeightPattern(LAYER + "block_sparse_moe.w2", stacked=True, transposed=True),
}
SEPARATE_GATE = LAYER + "feed_forward.gate.weight"
STACKED_GATE = LAYER + "block_sparse_moe.gate.weight"

_EMBEDDING = "tok_embeddings.weight"
# Parts of names in transformers and their replacements here, applied in order; the last removes the remaining prefix.
_NAMES = (
    ("model.embed_tokens.", "tok_embeddings."),
    ("lm_head.", "output."),
    ("input_layernorm.", "attention_norm."),
    ("post_attention_layernorm.", "ffn_norm."),
    ("self_attn.q_proj.", "attention.wq."),
    ("self_attn.k_proj.", "attention.wk."),
    ("self_attn.v_proj.", "attention.wv."),
    ("self_attn.o_proj.", "attention.wo."),
    ("model.", ""),
)


def size_checks(decoder: DecoderSizes) -> tuple[SizeCheck, ...]:
    """The tensor that shows the sizes of the whole model."""
    return (
        ("vocab_size", decoder.vocab_size, _EMBEDDING, 0),
        ("hidden_size", decoder.hidden_size, _EMBEDDING, 1),
    )


def rename(checkpoint: Checkpoint, config: Config, model: MoeModel) -> MoeModel:
    """Maps a model that is described in the names of transformers to the tensors of a checkpoint in Mistral's format."""
    check_num_layers(checkpoint, config, "num_hidden_layers", model.num_layers, LAYER)
    # All layers have the same heads.
    dense = {name: _stored(name, tensor, model.mixers[0]) for name, tensor in model.dense.items()}
    return replace(model, dense=dense)


def _stored(name: str, tensor: DenseTensor, mixer: Mixer) -> DenseTensor:
    if tensor.source != name:  # A gate: its source already has the name of this format.
        return tensor
    source = name
    for theirs, ours in _NAMES:
        source = source.replace(theirs, ours)
    assert isinstance(mixer, Attention)
    rotary_heads = {"q_proj": mixer.num_heads, "k_proj": mixer.num_kv_heads}.get(name.split(".")[-2])
    return replace(tensor, source=source, rotary_heads=rotary_heads)
