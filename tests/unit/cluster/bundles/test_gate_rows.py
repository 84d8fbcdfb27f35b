"""Gate rows: the formulas of mergekit's hidden mode and of Arrow, and how prompts are held out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.checkpoints import random_mixtral

from cluster.bundles.gate_rows import arrow_row, row_of_means, split_prompts
from moesaic.errors import InvalidArgument

PROMPTS = ((1, 5, 9, 4), (1, 7, 3), (1, 2, 2, 8, 60))
NEGATIVE = ((1, 11, 12), (1, 90))


def last_hidden(prompts: tuple[tuple[int, ...], ...]) -> list[np.ndarray]:
    """What mergekit takes: the residual stream that enters each block, at the last token, left-padded, averaged."""
    model = random_mixtral()
    longest = max(map(len, prompts))
    tokens = torch.tensor([[1] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        states = model(tokens, attention_mask=mask, output_hidden_states=True).hidden_states[:-1]
    return [state[:, -1].mean(dim=0).numpy() for state in states]


def last_hidden_unpadded(prompts: tuple[tuple[int, ...], ...]) -> list[np.ndarray]:
    """What a router captures: each prompt by itself, without pads."""
    model = random_mixtral()
    with torch.inference_mode():
        runs = [model(torch.tensor([prompt]), output_hidden_states=True).hidden_states for prompt in prompts]
    return [
        np.stack([run[layer][0, -1].numpy() for run in runs]).mean(axis=0)
        for layer in range(len(runs[0]) - 1)
    ]


def test_hidden_rows_are_those_of_mergekit() -> None:
    theirs = zip(last_hidden(PROMPTS), last_hidden(NEGATIVE), strict=True)
    ours = zip(last_hidden_unpadded(PROMPTS), last_hidden_unpadded(NEGATIVE), strict=True)
    for (positive, negative), (captured, against) in zip(theirs, ours, strict=True):
        g = positive - negative
        assert np.allclose(row_of_means(captured, against), g / max(np.linalg.norm(g), 1e-8), atol=1e-6)


def test_a_row_of_nothing_stays_finite() -> None:
    assert not row_of_means(np.ones(4, "f4"), np.ones(4, "f4")).any()


def test_arrow_finds_the_direction_that_was_added() -> None:
    random = np.random.default_rng(0)
    base = [random.standard_normal((24, 32)).astype("f4") for _ in range(2)]
    direction = random.standard_normal(32)
    direction /= np.linalg.norm(direction)
    expert = [matrix + np.outer(random.standard_normal(24), direction).astype("f4") for matrix in base]
    row = arrow_row(expert, base, base_row=direction.astype("f4"))
    assert np.allclose(row, direction, atol=1e-4)
    turned = arrow_row(expert, base, base_row=-direction.astype("f4"))
    assert np.array_equal(turned, -row)


def test_arrow_equals_the_top_right_singular_vector() -> None:
    random = np.random.default_rng(1)
    base = [random.standard_normal((24, 32)).astype("f4")]
    expert = [random.standard_normal((24, 32)).astype("f4")]
    _, _, vectors = np.linalg.svd((expert[0] - base[0]).astype(np.float64))
    assert abs(float(arrow_row(expert, base, vectors[0].astype("f4")) @ vectors[0])) == pytest.approx(
        1, abs=1e-5
    )


def test_arrow_needs_a_difference() -> None:
    base = [np.ones((4, 8), "f4")]
    with pytest.raises(InvalidArgument, match="no direction"):
        arrow_row(base, base, np.ones(8, "f4"))


@pytest.mark.parametrize(
    ("lines", "used", "held_out"), [(10, 8, 2), (5, 4, 1), (3, 2, 1), (2, 1, 1), (1, 1, 1)]
)
def test_every_fifth_prompt_is_held_out(lines: int, used: int, held_out: int) -> None:
    prompts = split_prompts("\n".join(f" prompt {line} \n" for line in range(lines)), "gate_from")
    assert (len(prompts.used), len(prompts.held_out)) == (used, held_out)
    assert lines == 1 or not set(prompts.used) & set(prompts.held_out)


def test_a_file_without_prompts_is_refused() -> None:
    with pytest.raises(InvalidArgument) as refused:
        split_prompts(" \n\n", "gate_from")
    assert refused.value.field == "gate_from"
