"""In bfloat16 no two programs give the same numbers, so what counts is how far they are from the truth: the same weights
computed in float32. Ours may be no further from it than transformers is by its own bfloat16.

A choice of experts that rounding turns over moves a token by far more than rounding itself, in either program and by
chance; so it is the quantiles of all tokens that are compared, over several models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.local_router import lonely_router
from support.random_models import random_model, reference_logits, write_model
from support.striped_hyena import Reference, write_striped_hyena
from support.tiny_families import SIZES, TINY
from transformers import AutoModelForCausalLM, PreTrainedModel

LENGTHS = (9, 37, 60)
NUM_NEW = 2
NUM_MODELS = 4
DENSE = {name: SIZES[name] for name in SIZES if name != "num_experts_per_tok"}
MULTI_HEAD = {"num_key_value_heads": SIZES["num_attention_heads"]}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": SIZES,
    "qwen2_moe": SIZES,
    "qwen3_moe": SIZES,
    "deepseek_v3": SIZES | MULTI_HEAD,
    "gpt_oss": SIZES,
    "granitemoe": SIZES,
    "llama4_text": SIZES,
    "phi": DENSE,
    "hunyuan_v1_moe": SIZES,
    "afmoe": SIZES,
}
# Not to be rounded: the one because its module declares it so, the other because it decides between experts.
EXACT = ("gate.wg.weight", "expert_bias")
LEAN = ("mixtral", "qwen2_moe", "qwen3_moe")
# Ours against that of transformers.
MOST_IN_THE_MIDDLE, MOST_NEAR_THE_END = 1.2, 2.0


@pytest.mark.parametrize(
    ("family", "decoder"),
    [*((family, "lean") for family in LEAN), *((family, "hf") for family in CONFIGS)],
)
def test_logits_are_as_close_to_float32_as_those_of_transformers(
    tmp_path: Path, family: str, decoder: str
) -> None:
    ours, theirs = [], []
    for seed in range(NUM_MODELS):
        folder = write_model(rounded_model(family, seed), tmp_path / str(seed))
        exact, rounded = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            for dtype in (torch.float32, torch.bfloat16)
        )
        router = lonely_router(folder, dtype="bfloat16", decoder=decoder)
        sequences = prompts()
        for prompt, rows, output in zip(sequences, *router.run(sequences, num_new=NUM_NEW), strict=True):
            truth = reference_logits(exact, prompt + output)
            ours.append(errors(rows, truth))
            theirs.append(errors(reference_logits(rounded, prompt + output), truth))
    middle, near_the_end = quantiles(ours) / quantiles(theirs)
    assert middle < MOST_IN_THE_MIDDLE
    assert near_the_end < MOST_NEAR_THE_END


def test_a_striped_hyena_is_as_close_to_float32_as_its_rounding_lets_it_be(tmp_path: Path) -> None:
    """There is no other program to compare with; an operation rounds by 2^-9, and there are some dozens in a row."""
    found = []
    for seed in range(NUM_MODELS):
        folder = write_striped_hyena(tmp_path / str(seed), seed=seed, dtype=torch.bfloat16)
        router, reference = lonely_router(folder, dtype="bfloat16"), Reference(folder)
        sequences = prompts()
        for prompt, rows, output in zip(sequences, *router.run(sequences, num_new=NUM_NEW), strict=True):
            found.append(errors(rows, reference.logits(prompt + output)))
    middle, near_the_end = quantiles(found)
    assert middle < 2 * 2**-7
    assert near_the_end < 4 * 2**-7


def rounded_model(family: str, seed: int) -> PreTrainedModel:
    """Of weights that bfloat16 can hold, but for a few."""
    model = random_model(family, seed, **(CONFIGS[family] | TINY.get(family, {})))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not name.endswith(EXACT):
                tensor.copy_(tensor.bfloat16())
    return model


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, SIZES["vocab_size"], (n,), generator=generator).tolist() for n in LENGTHS]


def errors(rows: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Of each row [T, V], against the size of a usual one, [T]."""
    return (rows.float() - truth).norm(dim=1) / truth.norm(dim=1).mean()


def quantiles(found: list[torch.Tensor]) -> torch.Tensor:
    """[2]"""
    return torch.cat(found).double().quantile(torch.tensor([0.5, 0.9], dtype=torch.float64))
