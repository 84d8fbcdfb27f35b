"""What the soak of changes calls wrong: an answer of two epochs, one that is not covered, and another token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import options
from harness.noisy_experts import NoisyBundle, load_reference, write_noisy_bundle
from swap_soak import Answer, Run, _check

# "ROMEO:", and the end of the line.
PROMPT = (0, 2251, 27, 200)
STATES = {"first": frozenset[str](), "second": frozenset({"m"})}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NoisyBundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return {"m": write_noisy_bundle(folder / "m", options.DEMO_MODEL, 3, new=True, seed=1)}


@torch.inference_mode()
def greedy(number: int, *put_in: NoisyBundle) -> list[int]:
    model, tokens = load_reference(options.DEMO_MODEL, put_in), list(PROMPT)
    for _ in range(number):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def answer(tokens: list[int], *epochs: str, is_covered: bool = True) -> Answer:
    return Answer(PROMPT, tokens, [], set(epochs), is_covered)


def run_of(*answers: Answer) -> Run:
    run = Run(states=dict(STATES))
    run.traffic.answers += answers
    return run


def test_answers_of_two_epochs_or_of_an_unknown_one_or_uncovered_ones_are_mixed(
    bundles: dict[str, NoisyBundle],
) -> None:
    tokens = greedy(4)
    run = run_of(
        answer(tokens, "first"),
        answer(tokens, "first", "second"),
        answer(tokens, "third"),
        answer(tokens, "first", is_covered=False),
    )
    verdicts = _check(run, bundles)
    assert (verdicts.num_checked, verdicts.num_mixed, verdicts.num_wrong) == (1, 3, 0)


def test_an_answer_is_held_to_the_weights_of_its_own_epoch(bundles: dict[str, NoisyBundle]) -> None:
    grown = greedy(12, bundles["m"])
    assert grown != greedy(12)
    verdicts = _check(run_of(answer(grown, "second"), answer(grown, "first")), bundles)
    assert (verdicts.num_checked, verdicts.num_wrong, verdicts.num_mixed) == (2, 1, 0)
    assert verdicts.num_by_state == {"m": 1, "base": 1}


def test_a_bundle_of_noise_passes_every_check(bundles: dict[str, NoisyBundle]) -> None:
    bundle = bundles["m"].bundle
    assert [expert.slot for expert in bundle.manifest.experts] == [None] * 4
    assert Path(bundle.folder, "manifest.json").exists()
