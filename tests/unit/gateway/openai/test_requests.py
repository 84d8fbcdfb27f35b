"""What a client may ask, and what of it reaches a router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, TypeAdapter, ValidationError

from gateway.openai.errors import from_validation
from gateway.openai.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeRequest,
)
from moesaic.expert_policy import ExpertPolicy
from moesaic.v1 import inference_pb2 as pb


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "x", **fields})


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "x"}], **fields})


def nulls(body: type[BaseModel]) -> dict[str, None]:
    return {name: None for name, field in body.model_fields.items() if not field.is_required()}


def test_null_means_absent_for_every_optional_field() -> None:
    assert completion(**nulls(CompletionRequest)).calls() == completion().calls()
    assert chat(**nulls(ChatCompletionRequest)).calls() == chat().calls()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("text", ["text"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([], [[]]),
    ],
)
def test_each_prompt_is_a_call_of_its_own(prompt: object, expected: list[object]) -> None:
    calls = completion(prompt=prompt, model="m", n=2, add_special_tokens=False).calls()
    got = [call.text if call.HasField("text") else list(call.token_ids.ids) for call in calls]
    assert got == expected
    assert {(call.model, call.n, call.add_special_tokens) for call in calls} == {("m", 2, False)}


def test_a_cache_salt_is_the_tenant_of_every_call() -> None:
    calls = [*completion(prompt=["a", "b"], cache_salt="blue").calls(), *chat(cache_salt="blue").calls()]
    assert [call.tenant for call in calls] == ["blue"] * 3
    assert completion().calls()[0].tenant == ""


def test_what_selects_the_weights_reaches_every_call() -> None:
    fields = {
        "experts": {"deny": ["a", "1:2"], "top_k": 2},
        "epoch": "e1",
        "session_id": "s1",
        "return_weight_versions": True,
    }
    for call in (*completion(prompt=["a", "b"], **fields).calls(), *chat(**fields).calls()):
        assert call.experts == pb.ExpertPolicy(deny=["a", "1:2"], top_k=2)
        assert (call.epoch, call.session_id, call.return_weight_versions) == ("e1", "s1", True)


@pytest.mark.parametrize("experts", [None, {}, {"deny": []}, {"deny": None, "on_missing": None}])
def test_experts_without_an_entry_are_no_policy(experts: object) -> None:
    assert not completion(experts=experts).calls()[0].HasField("experts")


@pytest.mark.parametrize("word", ["wait", "fail", "substitute", "renormalise"])
def test_the_word_on_missing_experts_reaches_the_router(word: str) -> None:
    (call,) = completion(experts={"on_missing": word}).calls()
    assert call.experts == ExpertPolicy(on_missing=word).to_pb()


def test_sampling_fields_reach_the_router_under_their_own_names() -> None:
    (call,) = completion(
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        seed=-7,
        stop="end",
        logit_bias={"5": -2},
        min_tokens=3,
        stop_token_ids=[9],
        ignore_eos=True,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=1,
    ).calls()
    sampling = call.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0, 0.5, 0, -7)
    assert sampling.min_p == pytest.approx(0.1)
    assert (list(sampling.stop), list(sampling.stop_token_ids), dict(sampling.logit_bias)) == (
        ["end"],
        [9],
        {5: -2},
    )
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.include_stop_in_output) == (3, True, True)
    assert sampling.HasField("skip_special_tokens") and not sampling.skip_special_tokens
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (
        1.5,
        -1,
        1,
    )


def test_absent_fields_keep_the_routers_defaults() -> None:
    sampling = chat().calls()[0].sampling
    assert not any(
        sampling.HasField(name)
        for name in ("max_tokens", "temperature", "top_p", "seed", "logprobs", "prompt_logprobs")
    )


def test_completions_stop_after_16_tokens_unless_told_otherwise() -> None:
    assert completion().calls()[0].sampling.max_tokens == 16
    assert completion(max_tokens=None).calls()[0].sampling.max_tokens == 16
    assert completion(max_tokens=3).calls()[0].sampling.max_tokens == 3


def test_echo_asks_for_the_log_probabilities_of_the_prompt_too() -> None:
    assert completion(logprobs=2, echo=True).calls()[0].sampling.prompt_logprobs == 2
    assert completion(echo=True).calls()[0].echo and not completion().calls()[0].echo
    assert not completion(logprobs=2).calls()[0].sampling.HasField("prompt_logprobs")
    assert completion(max_tokens=0, echo=True).calls()[0].sampling.max_tokens == 0


def test_what_a_decoder_begins_with_is_handed_on() -> None:
    assert completion(decoder_prompt=[5, 6]).calls()[0].decoder_prompt == [5, 6]
    assert completion().calls()[0].decoder_prompt == []


def test_a_chat_takes_either_name_of_the_limit() -> None:
    assert chat(max_tokens=3).calls()[0].sampling.max_tokens == 3
    assert chat(max_completion_tokens=4).calls()[0].sampling.max_tokens == 4
    assert chat(max_tokens=4, max_completion_tokens=4).calls()[0].sampling.max_tokens == 4


def test_text_parts_stay_parts_and_replies_can_be_sent_back() -> None:
    (call,) = chat(
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "audio": None},
            {"role": "user", "content": "d", "name": "ann"},
        ],
        chat_template_kwargs={"think": False, "n": 2},
        add_generation_prompt=False,
    ).calls()
    assert [(m.role, m.content, [p.text for p in m.parts], m.name) for m in call.chat.messages] == [
        ("user", "", ["a", "b"], ""),
        ("assistant", "c", [], ""),
        ("user", "d", [], "ann"),
    ]
    assert dict(call.chat.template_kwargs) == {"think": False, "n": 2}
    assert call.chat.HasField("add_generation_prompt") and not call.chat.add_generation_prompt


@pytest.mark.parametrize("turn", [{"content": None}, {}, {"content": ""}])
def test_an_assistants_turn_may_lack_content(turn: dict[str, Any]) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", **turn}, {"role": "user", "content": "b"}]
    (call,) = chat(messages=talk).calls()
    assert [m.content for m in call.chat.messages] == ["a", "", "b"]


def test_keys_of_a_message_that_no_template_shows_are_ignored() -> None:
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    (call,) = chat(messages=[{"role": "user", "content": [part], "id": "1", "timestamp": 5}]).calls()
    assert [part.text for part in call.chat.messages[0].parts] == ["a"]


@pytest.mark.parametrize("make", [completion, chat])
def test_what_cannot_change_an_answer_is_accepted_without_effect(make: Callable[..., Any]) -> None:
    """Where OpenAI's clients say who asks, and how the request is to be kept, billed and cached."""
    fields = {
        "user": "u",
        "safety_identifier": "s",
        "store": True,
        "metadata": {"team": "a"},
        "service_tier": "flex",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
    }
    options = {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}
    plain = make(stream=True, stream_options={"include_usage": True}, seed=1)
    assert make(**fields, **options, seed=1).calls() == plain.calls()


def test_a_chat_without_tools_may_say_how_it_would_call_them() -> None:
    prediction = {"type": "content", "content": "x"}
    assert chat(parallel_tool_calls=False, prediction=prediction, seed=1).calls() == chat(seed=1).calls()


def test_many_stop_strings_are_taken() -> None:
    stops = [f"stop {n}" for n in range(64)]
    assert list(completion(stop=stops).calls()[0].sampling.stop) == stops


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"logit_bias": {"5": 1, "abc": 2}}, "logit_bias", "'abc'"),
        ({"logit_bias": {"5": 1, "99999999999": 2}}, "logit_bias", "'99999999999'"),
        ({"logit_bias": {"5": 1, "6": "x"}}, "logit_bias.6", "logit_bias.6"),
        ({"seed": "a"}, "seed", "[-9223372036854775808, 9223372036854775807]"),
        ({"seed": 1.5}, "seed", "[-9223372036854775808, 9223372036854775807]"),
        ({"seed": -(2**63) - 1}, "seed", "[-9223372036854775808, 9223372036854775807]"),
    ],
)
def test_an_error_names_what_is_wrong_and_what_would_be_right(
    fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        completion(**fields)
    located = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    error = from_validation(RequestValidationError(located))
    assert error.param == param and words in error.message


def test_options_that_say_nothing_new_are_accepted() -> None:
    chat(response_format={"type": "text"}, tool_choice="none", tools=[], user="u")
    completion(best_of=2, n=2, suffix="", user="u")
    completion(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})


@pytest.mark.parametrize(
    "fields",
    [
        {"zz": 1},
        {"prompt": None},
        {"prompt": 5},
        {"prompt": {"a": 1}},
        {"prompt": [1, "a"]},
        {"prompt": [1, True]},
        {"prompt": [1, -1]},
        {"prompt": [1, 2**32]},
        {"prompt": ["a", 1]},
        {"prompt": [[1], "a"]},
        {"prompt": ["a"] * 1025},
        {"max_tokens": "5"},
        {"max_tokens": 5.0},
        {"max_tokens": -1},
        {"max_tokens": 0},
        {"n": 0},
        {"n": 2**40},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e300},
        {"temperature": "hot"},
        {"seed": 2**63},
        {"top_k": -2},
        {"logprobs": True},
        {"logprobs": -1},
        {"stop": [""]},
        {"stop": ["a"] * 129},
        {"stop": [1]},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {"٣": 1}},
        {"logit_bias": {"9999999999": 1}},
        {"logit_bias": {"1": float("inf")}},
        {"stream": "yes"},
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"other": True}},
        {"best_of": 3, "n": 2},
        {"suffix": "tail"},
        {"echo": 1},
    ],
)
def test_a_completion_that_cannot_be_meant_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        completion(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "system"}]},
        {"messages": [{"role": "assistant", "content": "x", "reasoning_content": "hm"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}
            ]
        },
        {"messages": [{"role": "", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "auto"},
        {"response_format": {"type": "json_object"}},
        {"chat_template": "{{ 1 }}"},
        {"chat_template_kwargs": {"a": float("inf")}},
        {"chat_template_kwargs": {"a": [10**400]}},
        {"top_logprobs": 2},
        {"max_tokens": 2, "max_completion_tokens": 3},
        {"max_tokens": 0},
        {"logprobs": 3},
    ],
)
def test_a_chat_that_cannot_be_meant_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        chat(**fields)


def test_a_wrong_list_costs_one_error_however_long_it_is() -> None:
    with pytest.raises(ValidationError) as caught:
        completion(prompt=[1, *["x"] * 200_000])
    assert len(caught.value.errors()) == 1


def test_tokenize_takes_a_text_or_a_conversation() -> None:
    requests: TypeAdapter[Any] = TypeAdapter(TokenizeRequest)
    text = requests.validate_python({"prompt": "a", "add_special_tokens": False})
    assert (text.call().text, text.call().add_special_tokens) == ("a", False)
    talk = requests.validate_python({"messages": [{"role": "user", "content": "a"}]})
    assert isinstance(talk, TokenizeChatRequest)
    assert talk.call().chat.messages[0].content == "a"
    assert list(DetokenizeRequest(tokens=[1, 2]).call().token_ids) == [1, 2]
