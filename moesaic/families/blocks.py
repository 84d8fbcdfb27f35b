"""The building blocks that most families share: a decoder of layers, each with attention, norms and one channel mixer.

Tensors are listed by the name of their parameter in transformers 5; where a checkpoint uses another name, `source` has
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moesaic.families.config import Config
from moesaic.families.model import Attention, DenseTensor, Layout, WeightPattern

Named = Iterable[tuple[str, DenseTensor]]

LAYER = "model.layers.{layer}."
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def tensor(name: str, *shape: int) -> tuple[str, DenseTensor]:
    """A tensor that the checkpoint stores under the name of its parameter."""
    return name, DenseTensor(shape, name)


def read_attention(config: Config, hidden_size: int, *, window: int | None = None) -> Attention:
    """The attention heads, from the keys that nearly all families use."""
    num_heads = config.size("num_attention_heads")
    num_kv_heads = config.size("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        config.fail("num_key_value_heads", "must divide num_attention_heads")
    head_dim = config.size("head_dim", default=hidden_size // num_heads or 1)
    return Attention(num_heads, num_kv_heads, head_dim, window)


def ends(hidden_size: int, vocab_size: int) -> Named:
    """The embedding, the last norm and the head."""
    yield tensor(EMBEDDING, vocab_size, hidden_size)
    yield tensor("model.norm.weight", hidden_size)
    yield tensor(HEAD, vocab_size, hidden_size)


def attention_tensors(
    prefix: str, attention: Attention, hidden_size: int, *, bias: bool = False, output_bias: bool = False
) -> Named:
    """The four projections; `prefix` ends with a dot."""
    queries = attention.num_heads * attention.head_dim
    keys = attention.num_kv_heads * attention.head_dim
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield tensor(f"{prefix}{name}.weight", rows, hidden_size)
        if bias:
            yield tensor(f"{prefix}{name}.bias", rows)
    yield tensor(f"{prefix}o_proj.weight", hidden_size, queries)
    if output_bias:
        yield tensor(f"{prefix}o_proj.bias", hidden_size)


def norms(prefix: str, hidden_size: int, *names: str, bias: bool = False) -> Named:
    for name in names:
        yield tensor(f"{prefix}{name}.weight", hidden_size)
        if bias:
            yield tensor(f"{prefix}{name}.bias", hidden_size)


def pre_norm_layer(
    layer: int, attention: Attention, hidden_size: int, *, bias: bool = False, output_bias: bool = False
) -> Named:
    """The tensors of a layer without its MLP, in the structure that Llama made common."""
    prefix = LAYER.format(layer=layer)
    yield from norms(prefix, hidden_size, "input_layernorm", "post_attention_layernorm")
    yield from attention_tensors(
        prefix + "self_attn.", attention, hidden_size, bias=bias, output_bias=output_bias
    )


def mlp_tensors(prefix: str, hidden_size: int, inner_size: int) -> Named:
    """The tensors of a gated MLP that the router computes; `prefix` ends with a dot."""
    yield tensor(f"{prefix}gate_proj.weight", inner_size, hidden_size)
    yield tensor(f"{prefix}up_proj.weight", inner_size, hidden_size)
    yield tensor(f"{prefix}down_proj.weight", hidden_size, inner_size)


def separate(prefix: str, gate: str, up: str, down: str) -> Layout:
    """Every weight is a separate tensor; `prefix` has {layer} and {slot}."""
    names = {"gate": gate, "up": up, "down": down}
    return {weight: WeightPattern(f"{prefix}{name}.weight") for weight, name in names.items()}


def fused(prefix: str) -> Layout:
    """All slots of a layer are in two tensors, with the gate rows before the up rows, as transformers 5 holds them."""
    return {
        "gate": WeightPattern(f"{prefix}gate_up_proj", stacked=True, part=(0, 2)),
        "up": WeightPattern(f"{prefix}gate_up_proj", stacked=True, part=(1, 2)),
        "down": WeightPattern(f"{prefix}down_proj", stacked=True),
    }


def dense_layout(prefix: str) -> Layout:
    """The MLP of a dense layer, as the layer's one expert."""
    return separate(prefix, "gate_proj", "up_proj", "down_proj")


def mapping(*parts: Named) -> Mapping[str, DenseTensor]:
    return {name: dense for part in parts for name, dense in part}
