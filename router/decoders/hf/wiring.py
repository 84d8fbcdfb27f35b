"""Where the modules of each family of transformers hold their experts, as data.

A family that is not listed here but uses the experts interface of transformers keeps its own block and gate; only its
experts are replaced.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wiring:
    """Names of submodules. `block` is the part of a decoder layer that holds the experts, or the MLP of a dense layer."""

    block: str = "mlp"
    gate: str = "gate"
    # The expert that is computed for every token in addition to the others, and the gate whose sigmoid weighs it.
    shared: str | None = None
    shared_gate: str | None = None
    # Whether the layer expects the block to return its output as the first of a pair.
    returns_pair: bool = False
    # Whether gate logits are computed in float32, whatever dtype the model computes in.
    exact_gate: bool = False


_DEEPSEEK = Wiring(shared="shared_experts", exact_gate=True)
_LLAMA4 = Wiring(block="feed_forward", gate="router", shared="shared_expert", returns_pair=True)

WIRINGS: dict[str, Wiring] = {
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "flex_olmo": Wiring(),
    "glm4_moe": _DEEPSEEK,
    "gpt_oss": Wiring(gate="router", returns_pair=True),
    "granitemoe": Wiring(block="block_sparse_moe", gate="router"),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "ministral": Wiring(),
    "mistral": Wiring(),
    "mixtral": Wiring(),
    "olmoe": Wiring(),
    "phi": Wiring(),
    "phimoe": Wiring(gate="router"),
    "phixtral": Wiring(),
    "qwen2_moe": Wiring(shared="shared_expert", shared_gate="shared_expert_gate"),
    "qwen3_moe": Wiring(),
}
