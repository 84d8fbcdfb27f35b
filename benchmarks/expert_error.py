"""What holding the experts in fewer bits does to a model's answers: logits, and the perplexity of a text.

The model is that of `transformers` in float32; only its experts are ours, in the form in which a worker holds them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from expert_worker.expert import Expert, choose_form
from expert_worker.loader import load_experts
from moesaic.checkpoint import Checkpoint, open_checkpoint
from moesaic.families import MoeModel, describe_model
from moesaic.manifest import ExpertAddress
from moesaic.settings import ExpertDType

# Shapes: W windows of a text, T tokens of one, V vocabulary, K experts a token, D hidden size.

EXPERT_DTYPES: tuple[ExpertDType, ...] = ("fp32", "bf16", "int8", "int4")
WINDOW_TOKENS = 256
NUM_WINDOWS = 24
NAME = "moesaic-held-experts"

Experts = Mapping[ExpertAddress, Expert]


@dataclass(frozen=True, slots=True)
class Error:
    """Against the model with float32 experts of transformers' own; the logits have a spread of their own."""

    expert_dtype: str
    expert_mib: float
    logit_max: float
    logit_mean: float
    divergence: float  # KL, in nats a token
    same_choice: float  # share of positions with the same likeliest token
    perplexity: float


def measure_errors(folder: Path, text: str | None) -> list[Error]:
    """First transformers itself, then every form that the model's shape allows. Without a text, one of the model's own."""
    checkpoint = open_checkpoint(folder)
    shape = describe_model(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = _windows(folder, model, text)
    expected = _logits(model, windows)
    errors = [_compare("transformers fp32", 0, expected, expected, windows)]
    ALL_EXPERTS_FUNCTIONS.register(NAME, _compute)
    for expert_dtype in EXPERT_DTYPES:
        experts = _load(checkpoint, shape, expert_dtype)
        for index, layer in enumerate(model.get_decoder().layers):
            layer.mlp.experts.held = {
                slot: experts[ExpertAddress(index, slot)] for slot in range(shape.num_slots[index])
            }
        model.set_experts_implementation(NAME)
        held = sum(expert.num_bytes for expert in experts.values()) / len(experts)
        errors.append(_compare(expert_dtype, held, _logits(model, windows), expected, windows))
    return errors


def _load(checkpoint: Checkpoint, shape: MoeModel, expert_dtype: ExpertDType) -> Experts:
    form = choose_form(
        expert_dtype,
        torch.device("cpu"),
        torch.float32,
        (experts.module for experts in shape.experts.values()),
        batch_invariant=False,
    )
    return {address: held.expert for address, held in load_experts(checkpoint, shape, shape.addresses, form)}


def _compute(module: Any, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The experts seam of transformers: hidden [T, D], slots and weights [T, K] -> [T, D]."""
    total = torch.zeros_like(hidden)
    for slot, expert in module.held.items():
        rows, ranks = (slots == slot).nonzero(as_tuple=True)
        if len(rows):
            total.index_add_(0, rows, expert(hidden[rows]).float() * weights[rows, ranks, None])
    return total


def _windows(folder: Path, model: Any, text: str | None) -> torch.Tensor:
    """[W, T] token ids, spread over the text."""
    if text is None:
        torch.manual_seed(0)
        start = torch.full((NUM_WINDOWS, 1), model.config.bos_token_id or 0)
        return model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            min_length=WINDOW_TOKENS,
            max_length=WINDOW_TOKENS,
            pad_token_id=0,
        )
    token_ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"])
    windows = token_ids[: len(token_ids) // WINDOW_TOKENS * WINDOW_TOKENS].view(-1, WINDOW_TOKENS)
    return windows[:: max(1, len(windows) // NUM_WINDOWS)][:NUM_WINDOWS]


@torch.inference_mode()
def _logits(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """[W, T, V]."""
    return torch.cat([model(window[None]).logits for window in windows])


def _compare(
    name: str, held_bytes: float, logits: torch.Tensor, expected: torch.Tensor, windows: torch.Tensor
) -> Error:
    # Window by window: all of [W, T, V] at once, several times over, is a lot of memory.
    parts: list[Sequence[float]] = []
    for got, want, tokens in zip(logits, expected, windows, strict=True):
        likely, wanted = got.log_softmax(-1), want.log_softmax(-1)
        parts.append(
            (
                float((got - want).abs().max()),
                float((got - want).abs().mean()),
                # Rounding may leave less than nothing of a very small one.
                max(0.0, float(F.kl_div(likely, wanted, reduction="batchmean", log_target=True))),
                float((got.argmax(-1) == want.argmax(-1)).float().mean()),
                float(F.nll_loss(likely[:-1], tokens[1:])),
            )
        )
    most, mean, divergence, same, loss = zip(*parts, strict=True)
    return Error(
        name,
        held_bytes / 2**20,
        max(most),
        statistics.mean(mean),
        statistics.mean(divergence),
        statistics.mean(same),
        float(torch.tensor(statistics.mean(loss)).exp()),
    )
