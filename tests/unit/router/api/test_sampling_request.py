"""Bounds and defaults of sampling parameters, field by field."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from moesaic.errors import InvalidArgument
from moesaic.v1 import inference_pb2
from router.api.sampling_request import (
    ModelLimits,
    TextOptions,
    continuation_params,
    num_continuations,
    parse_sampling,
)
from router.engine.sampling_params import SamplingParams

LIMITS = ModelLimits(max_model_len=100, vocab_size=50, eos_token_ids=frozenset({2, 3}))


def parse(num_prompt_tokens: int = 10, **fields: Any) -> tuple[SamplingParams, TextOptions]:
    message = inference_pb2.SamplingParams(**fields)
    return parse_sampling(message, num_prompt_tokens=num_prompt_tokens, limits=LIMITS)


def test_absent_fields_take_their_defaults() -> None:
    params, text = parse()
    assert params == SamplingParams(max_tokens=90, seed=params.seed, stop_token_ids=frozenset({2, 3}))
    assert 0 <= params.seed < 2**63
    assert text == TextOptions((), frozenset(), include_stop=False, skip_special_tokens=True)


def test_given_fields_are_kept() -> None:
    params, text = parse(
        max_tokens=5,
        min_tokens=2,
        temperature=0.5,
        top_p=0.25,
        top_k=50,
        min_p=0.125,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=10,
        seed=-(2**63),
        stop=["a", "é" * 256],
        stop_token_ids=[7, 7],
        logit_bias={0: -100, 49: 100},
        logprobs=20,
        prompt_logprobs=0,
        skip_special_tokens=False,
        include_stop_in_output=True,
    )
    assert params == SamplingParams(
        max_tokens=5,
        min_tokens=2,
        temperature=0.5,
        top_p=0.25,
        top_k=50,
        min_p=0.125,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=10,
        seed=-(2**63),
        stop_token_ids=frozenset({2, 3, 7}),
        logit_bias={0: -100, 49: 100},
        logprobs=20,
        prompt_logprobs=0,
    )
    assert text == TextOptions(("a", "é" * 256), frozenset({7}), include_stop=True, skip_special_tokens=False)


def test_zero_is_a_value_where_the_field_is_optional() -> None:
    params, _ = parse(temperature=0.0, max_tokens=0, seed=0, logprobs=0)
    assert params.greedy
    assert (params.max_tokens, params.seed, params.logprobs) == (0, 0, 0)


def test_a_top_k_beyond_the_vocabulary_is_all_of_it() -> None:
    """As in transformers and vLLM: a client cannot know the size."""
    assert [parse(top_k=k)[0].top_k for k in (0, 49, 50, 51, 2**32 - 1)] == [0, 49, 50, 50, 50]


def test_defaults_hold_where_a_request_is_silent_and_its_own_values_win() -> None:
    defaults = inference_pb2.SamplingParams(
        temperature=0.25, top_p=0.5, top_k=7, min_p=0.125, repetition_penalty=1.5
    )
    limits = replace(LIMITS, sampling_defaults=defaults)

    def sampled(**fields: Any) -> tuple[float, ...]:
        message = inference_pb2.SamplingParams(**fields)
        params, _ = parse_sampling(message, num_prompt_tokens=1, limits=limits)
        return params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty

    assert sampled() == sampled(seed=3, stop=["x"]) == (0.25, 0.5, 7, 0.125, 1.5)
    neutral = {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
    assert sampled(**neutral) == (1, 1, 0, 0, 1)
    for place, (name, value) in enumerate(neutral.items()):
        expected = [0.25, 0.5, 7, 0.125, 1.5]
        expected[place] = value
        assert sampled(**{name: value}) == tuple(expected)
    assert defaults.top_k == 7, "the defaults themselves never change"


def test_a_bias_out_of_bounds_names_its_token() -> None:
    for bias in ({50: 0.0}, {7: 101.0}):
        with pytest.raises(InvalidArgument, match=rf"^logit_bias: .*token (id )?{min(bias)} "):
            parse(logit_bias={3: 1.0, **bias})


def test_end_of_sequence_is_ignored_on_request_but_not_stop_tokens() -> None:
    assert parse(ignore_eos=True, stop_token_ids=[3])[0].stop_token_ids == {3}


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.001, NAN, INF, -INF]),
        ("top_p", [-0.1, 1.001, NAN]),
        ("min_p", [-0.1, 1.001, NAN]),
        ("presence_penalty", [-2.001, 2.001, NAN]),
        ("frequency_penalty", [-2.001, 2.001, INF]),
        ("repetition_penalty", [0.0, -1.0, 10.001, NAN]),
        ("logprobs", [21]),
        ("prompt_logprobs", [21, 2**32 - 1]),
        ("stop", [["a"] * 129, [""], ["x" * 257], ["a\0b"]]),
        ("stop_token_ids", [[50], [0, 2**32 - 1]]),
        ("logit_bias", [{50: 0.0}, {1: 100.5}, {1: -100.5}, {1: NAN}]),
        ("min_tokens", [91, 2**32 - 1]),
    ],
)
def test_a_value_out_of_bounds_names_its_field(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidArgument) as caught:
            parse(**{field: value})
        assert caught.value.field == field
        assert caught.value.message.startswith(f"{field}: ")


def test_too_many_biases_are_refused() -> None:
    limits = ModelLimits(max_model_len=10, vocab_size=5000, eos_token_ids=frozenset())
    message = inference_pb2.SamplingParams(logit_bias=dict.fromkeys(range(1024), 1.0))
    parse_sampling(message, num_prompt_tokens=1, limits=limits)
    message.logit_bias[1024] = 1.0
    with pytest.raises(InvalidArgument, match="1024"):
        parse_sampling(message, num_prompt_tokens=1, limits=limits)


def test_min_tokens_are_bounded_by_max_tokens() -> None:
    assert parse(min_tokens=4, max_tokens=4)[0].min_tokens == 4
    with pytest.raises(InvalidArgument) as caught:
        parse(min_tokens=5, max_tokens=4)
    assert caught.value.field == "min_tokens"


def test_min_tokens_need_a_token_that_does_not_stop() -> None:
    everything = list(range(50))
    assert len(parse(stop_token_ids=everything)[0].stop_token_ids) == 50
    with pytest.raises(InvalidArgument) as caught:
        parse(stop_token_ids=everything, min_tokens=1)
    assert caught.value.field == "stop_token_ids"


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "fits"),
    [
        (99, None, True),
        (100, None, False),
        (100, 0, True),
        (101, 0, False),
        (99, 1, True),
        (99, 2, False),
        (1, 2**32 - 1, False),
    ],
)
def test_prompt_and_max_tokens_must_fit_the_context(
    num_prompt_tokens: int, max_tokens: int | None, fits: bool
) -> None:
    fields = {} if max_tokens is None else {"max_tokens": max_tokens}
    if fits:
        left = 100 - num_prompt_tokens if max_tokens is None else max_tokens
        assert parse(num_prompt_tokens, **fields)[0].max_tokens == left
        return
    with pytest.raises(InvalidArgument, match="this model's maximum context length is 100 tokens") as caught:
        parse(num_prompt_tokens, **fields)
    assert (caught.value.field, caught.value.reason) == ("prompt", "CONTEXT_LENGTH_EXCEEDED")


def test_the_number_of_continuations_is_bounded() -> None:
    assert [num_continuations(n) for n in (0, 1, 64)] == [1, 1, 64]
    with pytest.raises(InvalidArgument) as caught:
        num_continuations(65)
    assert caught.value.field == "n"


def test_every_continuation_has_a_seed_of_its_own_and_the_first_scores_the_prompt() -> None:
    params, _ = parse(seed=2**63 - 2, prompt_logprobs=1)
    several = [continuation_params(params, index) for index in range(3)]
    assert [p.seed for p in several] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert [p.prompt_logprobs for p in several] == [1, None, None]
