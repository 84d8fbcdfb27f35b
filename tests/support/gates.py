"""Random gates of every kind that takes other slots than those of the folder."""

from __future__ import annotations

import torch

from moesaic.compute.linear import Linear
from moesaic.epoch import GateRow
from moesaic.families.model import GateRule
from router.gating.gate import Gate

NUM_SLOTS, HIDDEN_SIZE = 8, 12
MIXTRAL = GateRule(top_k=2, renormalise=True)
GPT_OSS = GateRule(2, score="logit", weight="softmax", biased=True)
# One of every kind that takes other slots.
RULES = {
    "mixtral": MIXTRAL,
    "olmoe": GateRule(3),
    "gpt_oss": GPT_OSS,
    "phimoe": GateRule(2, score="logit", weight="sparse_mixer", jitter=0.01),
    "llama4": GateRule(1, score="logit", weight="sigmoid", weighs="input"),
    "nllb": GateRule(2, renormalise=True, second_threshold=0.2, scale=0.8),
}


def draw_gate(seed: int, rule: GateRule, *, invariant: bool = False) -> Gate:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(NUM_SLOTS, HIDDEN_SIZE, generator=generator)
    bias = torch.randn(NUM_SLOTS, generator=generator) if rule.biased and not invariant else None
    return Gate(rule, Linear(rows, batch_invariant=True) if invariant else rows, bias)


def draw_row(seed: int) -> GateRow:
    row = torch.randn(HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))
    return GateRow(row.numpy().tobytes())


def draw_hidden(seed: int, num_tokens: int = 7) -> torch.Tensor:
    return torch.randn(num_tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))
