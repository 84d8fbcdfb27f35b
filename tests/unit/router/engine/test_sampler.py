"""The sampler against hand-computed values and a plain reference, row by row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import DataLoss
from router.engine import sampler
from router.engine.sampler import SamplingState, sample, score
from router.engine.sampling_params import SampledToken, SamplingParams

VOCAB = 50


def state(prompt: Sequence[int] = (1,), output: Sequence[int] = (), **params: object) -> SamplingState:
    sampling = SamplingParams(max_tokens=8, **params)  # type: ignore[arg-type]
    return SamplingState(sampling, prompt, output)


def greedy(**rest: object) -> SamplingState:
    return state(temperature=0.0, **rest)  # type: ignore[arg-type]


def one(logits: Sequence[float] | torch.Tensor, of: SamplingState) -> SampledToken:
    row = torch.as_tensor(logits).unsqueeze(0)
    (sampled,) = sample(row, [of])
    assert isinstance(sampled, SampledToken)
    return sampled


def drawn_ids(logits: Sequence[float], num: int = 400, **params: object) -> Counter[int]:
    """How often each token comes out of `num` draws, each with a seed of its own."""
    first = params.pop("seed", 0)
    assert isinstance(first, int)
    seeds = ((first + place + 2**63) % 2**64 - 2**63 for place in range(num))
    states = [state(**{**params, "seed": seed}) for seed in seeds]  # type: ignore
    sampled = sample(torch.tensor([logits] * num), states)
    return Counter(token.token_id for token in sampled if isinstance(token, SampledToken))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_highest_logit_and_the_lowest_id_of_equals(dtype: torch.dtype) -> None:
    logits = torch.zeros(1, 100_003, dtype=dtype)
    logits[0, [77_777, 55, 99]] = 1
    (token,) = sample(logits, [greedy()])
    assert token == SampledToken(55, None)


def test_the_logits_are_left_unchanged() -> None:
    logits = torch.randn(3, VOCAB)
    before = logits.clone()
    sample(
        logits,
        [
            state(repetition_penalty=2.0, logit_bias={3: 9.0}),
            state(min_tokens=2, stop_token_ids=frozenset({4})),
            greedy(),
        ],
    )
    assert torch.equal(logits, before)


def test_a_sequence_samples_the_same_alone_and_among_others() -> None:
    kinds: list[dict[str, object]] = [
        {"seed": 1},
        {"seed": 2, "top_k": 5},
        {"seed": 3, "top_p": 0.8},
        {"seed": 4, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"seed": 5, "min_p": 0.05, "temperature": 0.7},
        {"seed": -6, "repetition_penalty": 1.3, "presence_penalty": 0.5, "logprobs": 3},
        {"temperature": 0.0},
        {"seed": 7, "temperature": 1.9, "logit_bias": {3: 4.0}, "logprobs": 1},
    ]
    steps = torch.randn(12, len(kinds), 1000, generator=torch.Generator().manual_seed(0)) * 3

    def run(members: Sequence[int]) -> list[list[SampledToken]]:
        states = {index: state(**kinds[index]) for index in members}  # type: ignore[arg-type]
        tokens: dict[int, list[SampledToken]] = {index: [] for index in members}
        for logits in steps:
            now = [
                SamplingState(s.params, s.prompt, [t.token_id for t in tokens[index]])
                for index, s in states.items()
            ]
            for index, token in zip(members, sample(logits[list(members)], now), strict=True):
                assert isinstance(token, SampledToken)
                tokens[index].append(token)
        return [tokens[index] for index in members]

    together = run(range(len(kinds)))
    assert together == [run([index])[0] for index in range(len(kinds))]
    assert together[::-1] == run(range(len(kinds) - 1, -1, -1))


def test_another_seed_gives_other_tokens_and_the_same_seed_the_same() -> None:
    logits = torch.zeros(64, 1000)

    def tokens(seed: int) -> list[object]:
        return [sample(row.unsqueeze(0), [s])[0] for s in [state(seed=seed)] for row in logits]

    assert tokens(11) == tokens(11)
    assert tokens(11) != tokens(12)


def test_draws_follow_the_distribution_at_the_given_temperature() -> None:
    logits = [0.0, 1.0, 2.0, -1.0]
    expected = torch.softmax(torch.tensor(logits) / 1.5, dim=-1).tolist()
    for top_k in (0, 4, 3):
        counts = drawn_ids(logits, num=20_000, temperature=1.5, top_k=top_k)
        kept = sorted(range(4), key=lambda i: -logits[i])[: top_k or 4]
        total = sum(expected[i] for i in kept)
        for i in kept:
            assert counts[i] / 20_000 == pytest.approx(expected[i] / total, abs=0.015)
        assert sum(counts[i] for i in kept) == 20_000


def test_top_k_keeps_exactly_k_and_the_lowest_ids_of_equals() -> None:
    assert set(drawn_ids([1.0, 3.0, 1.0, 1.0, 1.0], top_k=3)) == {1, 0, 2}
    assert set(drawn_ids([0.0] * 30, top_k=1)) == {0}


def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass() -> None:
    logits = [math.log(p) for p in (0.1, 0.5, 0.3, 0.1)]
    assert set(drawn_ids(logits, top_p=0.45)) == {1}
    assert set(drawn_ids(logits, top_p=0.55)) == {1, 2}
    assert set(drawn_ids(logits, top_p=0.85)) == {1, 2, 0}
    assert set(drawn_ids(logits, top_p=1e-6)) == {1}
    assert set(drawn_ids(logits, top_p=0.0)) == set(drawn_ids(logits, top_p=0.0, top_k=3)) == {1}


def test_min_p_is_relative_to_the_most_probable_token() -> None:
    logits = [math.log(p) for p in (0.1, 0.5, 0.3, 0.1)]
    assert set(drawn_ids(logits, min_p=0.5)) == {1, 2}
    assert set(drawn_ids(logits, min_p=0.1)) == {0, 1, 2, 3}
    assert set(drawn_ids(logits, min_p=1.0)) == {1}


def test_top_p_measures_what_top_k_and_min_p_left() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    # Of the two that top-k leaves, the first holds 4/7.
    assert set(drawn_ids(logits, top_k=2, top_p=0.5)) == {0}
    assert set(drawn_ids(logits, top_p=0.5)) == {0, 1}
    assert set(drawn_ids(logits, min_p=0.7, top_p=0.5)) == {0}


def test_temperature_comes_before_the_filters() -> None:
    logits = [math.log(p) for p in (0.6, 0.3, 0.1)]
    assert set(drawn_ids(logits, top_p=0.55)) == {0}
    assert set(drawn_ids(logits, top_p=0.55, temperature=10.0)) == {0, 1}


def test_repetition_penalty_weighs_prompt_and_output_once_each() -> None:
    logits = torch.tensor([[2.0, 2.0, -2.0, -2.0, 0.5]])
    of = greedy(prompt=[0, 0, 2], output=[0, 3], repetition_penalty=2.0)
    adjusted = sampler._adjust(logits, [of])
    assert adjusted.tolist() == [[1.0, 2.0, -4.0, -4.0, 0.5]]


def test_presence_and_frequency_penalties_count_generated_tokens_only() -> None:
    logits = torch.zeros(1, 5)
    of = greedy(prompt=[0, 1], output=[1, 1, 1, 4], presence_penalty=0.5, frequency_penalty=0.25)
    adjusted = sampler._adjust(logits, [of])
    assert adjusted.tolist() == [[0.0, -1.25, 0.0, 0.0, -0.75]]
    assert sampler._adjust(logits, [greedy(prompt=[0], presence_penalty=2.0)]).tolist() == [[0.0] * 5]


def test_logit_bias_forces_and_bans_tokens() -> None:
    logits = torch.randn(VOCAB)
    assert one(logits, greedy(logit_bias={7: 100.0})).token_id == 7
    best = one(logits, greedy()).token_id
    assert one(logits, greedy(logit_bias={best: -100.0})).token_id != best
    assert one(logits, state(logit_bias={7: 100.0})).token_id == 7


def test_stop_tokens_wait_for_min_tokens() -> None:
    logits = [0.0, 5.0, 1.0, 0.0]
    stop: dict[str, Any] = {"min_tokens": 2, "stop_token_ids": frozenset({1})}
    assert one(logits, greedy(**stop)).token_id == 2
    assert one(logits, greedy(output=[0], **stop)).token_id == 2
    assert one(logits, greedy(output=[0, 0], **stop)).token_id == 1
    assert 1 not in drawn_ids(logits, **stop)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_fails_alone(bad: float) -> None:
    logits = torch.randn(3, VOCAB)
    alone = [one(logits[0], state(seed=1)), one(logits[2], greedy(logprobs=2))]
    logits[1, 17] = bad
    first, poisoned, last = sample(logits, [state(seed=1), state(seed=2, top_k=3), greedy(logprobs=2)])
    assert isinstance(poisoned, DataLoss)
    assert poisoned.reason == "NON_FINITE_LOGITS"
    assert [first, last] == alone


def test_finite_logits_whose_sum_is_not_are_sampled() -> None:
    largest = torch.finfo(torch.float32).max
    good, bad = sample(
        torch.tensor([[0.0, largest, largest], [largest, math.nan, largest]]), [greedy(), greedy()]
    )
    assert good == SampledToken(1, None)
    assert isinstance(bad, DataLoss)


def test_an_empty_batch_and_a_batch_of_bad_rows_are_answered() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []
    (only,) = sample(torch.full((1, VOCAB), math.nan), [greedy()])
    assert isinstance(only, DataLoss)


def test_extreme_parameters_stay_finite() -> None:
    logits = torch.tensor([50.0, 60.0, -70.0, 60.5])
    assert set(drawn_ids(logits.tolist(), temperature=1e-45)) == {3}
    assert set(drawn_ids(logits.tolist(), temperature=1e-45, top_k=2, top_p=0.1)) == {3}
    assert one(logits, state(prompt=[0, 1, 2], repetition_penalty=1e-45)).token_id in {0, 1}
    assert set(drawn_ids(logits.tolist(), temperature=3e38, num=2000)) == {0, 1, 2, 3}


def test_a_draw_at_the_very_end_of_the_distribution_is_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "_uniform", lambda _: 1 - 2**-53)
    for size in range(1, 300):
        weights = torch.rand(1, size, dtype=torch.float64) + 1e-3
        padded = torch.nn.functional.pad(weights, (0, 5))
        assert sampler._draw(padded, [state()]).item() == size - 1


def test_logprobs_are_of_the_model_before_temperature_bias_and_penalties() -> None:
    logits = torch.randn(VOCAB)
    expected = torch.log_softmax(logits, dim=-1)
    of = state(output=[3, 4], temperature=0.3, frequency_penalty=2.0, logit_bias={9: 100.0}, logprobs=4)
    token = one(logits, of)
    assert token.token_id == 9
    assert token.logprobs is not None
    assert token.logprobs.token_id == 9
    assert token.logprobs.logprob == pytest.approx(expected[9].item())
    assert [i for i, _ in token.logprobs.top] == expected.topk(4).indices.tolist()
    assert [p for _, p in token.logprobs.top] == pytest.approx(expected.topk(4).values.tolist())


def test_zero_logprobs_ask_for_the_token_alone() -> None:
    tokens = sample(torch.zeros(2, 4), [greedy(logprobs=0), greedy(logprobs=2)])
    tops = [token.logprobs.top for token in tokens if isinstance(token, SampledToken) and token.logprobs]
    assert tops[0] == ()
    assert [i for i, _ in tops[1]] == [0, 1]


def test_equal_alternatives_are_listed_by_id() -> None:
    logits = [0.0, -0.0, 1.0, 0.0, 1.0, -3.0]
    (scored,) = score(torch.tensor([logits]), [5], 5)
    assert [i for i, _ in scored.top] == [2, 4, 0, 1, 3]
    (everything,) = score(torch.tensor([logits]), [0], 20)
    assert [i for i, _ in everything.top] == [2, 4, 0, 1, 3, 5]


def test_prompt_scores_equal_the_reference_for_any_number_of_rows() -> None:
    logits = torch.randn(150, VOCAB)
    targets = [i % VOCAB for i in range(150)]
    expected = torch.log_softmax(logits, dim=-1)
    scored = score(logits, targets, 2)
    assert [s.token_id for s in scored] == targets
    assert [s.logprob for s in scored] == pytest.approx(
        [expected[t, i].item() for t, i in enumerate(targets)]
    )
    assert [[i for i, _ in s.top] for s in scored] == expected.topk(2).indices.tolist()
    assert score(torch.empty(0, VOCAB), [], 2) == []


def test_a_prompt_score_that_is_not_finite_is_an_error() -> None:
    logits = torch.randn(70, VOCAB)
    logits[68, 3] = math.nan
    with pytest.raises(DataLoss):
        score(logits, [0] * 70, 1)


def reference_candidates(logits: Sequence[float], params: SamplingParams) -> set[int]:
    """Which tokens the filters leave, computed one token at a time."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    best = logits[ranked[0]]
    weights = {i: math.exp((logits[i] - best) / params.temperature) for i in ranked}
    kept = ranked[: params.top_k or len(ranked)]
    kept = [i for i in kept if weights[i] >= params.min_p]
    total = math.fsum(weights[i] for i in kept)
    result, mass = set[int](), 0.0
    for i in kept:
        if mass >= params.top_p * total:
            break
        result.add(i)
        mass += weights[i]
    return result


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40).map(lambda x: x / 8), min_size=1, max_size=40),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 2.5]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.05, 0.3, 0.77, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.4]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_every_draw_lies_in_what_the_filters_leave(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    params = {"temperature": temperature, "top_k": min(top_k, len(logits)), "top_p": top_p, "min_p": min_p}
    allowed = reference_candidates(logits, SamplingParams(max_tokens=1, **params))  # type: ignore[arg-type]
    assert set(drawn_ids(logits, num=20, seed=seed, **params)) <= allowed


def test_a_draw_depends_on_the_seed_and_the_place_of_the_token_alone() -> None:
    logits = torch.zeros(1, 1000)
    at_once = [sample(logits, [state(seed=7, output=[0] * place)]) for place in range(20)]
    again = [sample(logits, [state(seed=7, output=[9] * place)]) for place in reversed(range(20))]
    assert at_once == again[::-1]
    assert len({str(token) for token in at_once}) > 15
    assert at_once != [sample(logits, [state(seed=8, output=[0] * place)]) for place in range(20)]
