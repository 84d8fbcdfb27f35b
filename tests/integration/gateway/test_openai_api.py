"""The API as openai-python, benchmarks and scoring clients use it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest
from support.fake_router import encode, logprob_at
from support.gateway_site import Site, events

import moesaic
from moesaic.v1 import inference_pb2 as pb

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Completions


async def test_a_completion_has_text_usage_and_the_epoch(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model="fake", prompt="abc", max_tokens=5)
    assert reply.choices[0].text == "abcab"
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (3, 5, 8)
    assert reply.model_extra == {"epoch": "e1", "moesaic": {"epoch": "e1"}}
    assert (reply.object, reply.model) == ("text_completion", "fake")


async def test_a_stream_has_one_chunk_a_token_and_usage_at_its_end(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="fake", prompt="abc", max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].text for chunk in chunks[:-1]] == ["a", "b", "c", "a"]
    assert chunks[3].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4
    assert len({chunk.id for chunk in chunks}) == 1


async def test_stop_n_and_several_prompts(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(
        model="fake", prompt=["abc", "xyz"], n=2, max_tokens=8, stop=["ca", "zx"]
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in reply.choices] == ["ab", "b", "xy", "y"]
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}
    assert reply.usage is not None and reply.usage.prompt_tokens == 6


async def test_a_stream_of_several_choices_interleaves_them_by_index(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="fake", prompt=["abc", "xyz"], n=2, max_tokens=3, stream=True
    )
    texts = dict.fromkeys(range(4), "")
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "abc", 1: "bca", 2: "xyz", 3: "yzx"}


async def test_a_scoring_client_gets_the_exact_log_probabilities_of_its_prompt(site: Site) -> None:
    body = {
        "model": "fake",
        "prompt": [[97, 98, 99, 100], [120, 121]],
        "echo": True,
        "max_tokens": 1,
        "logprobs": 1,
        "temperature": 0,
        "seed": 1234,
    }
    async with httpx.AsyncClient(base_url=site.url, timeout=60) as http:
        reply = (await http.post("/v1/completions", json=body)).json()
    for choice, length in zip(reply["choices"], (4, 2), strict=True):
        values = choice["logprobs"]["token_logprobs"]
        tops = choice["logprobs"]["top_logprobs"]
        assert values == [None, *(logprob_at(position) for position in range(1, length + 1))]
        assert len(choice["logprobs"]["tokens"]) == len(tops) == length + 1
        assert tops[0] is None and all(top for top in tops[1:])
        greedy = [value == max(top.values()) for value, top in zip(values[1:], tops[1:], strict=True)]
        assert greedy == [position % 2 == 0 for position in range(1, length + 1)]
    assert reply["choices"][0]["text"] == "abcda"
    assert reply["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]


async def test_echo_without_a_token_scores_the_prompt_alone(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model="fake", prompt="abc", max_tokens=0, echo=True, logprobs=1)
    choice = reply.choices[0]
    assert (choice.text, choice.finish_reason) == ("abc", "length")
    assert choice.logprobs is not None and choice.logprobs.tokens == ["a", "b", "c"]
    assert reply.usage is not None and reply.usage.completion_tokens == 0


async def test_echo_in_a_stream_comes_with_the_first_token(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="fake", prompt="abc", max_tokens=2, echo=True, logprobs=0, stream=True
    )
    chunks = [chunk.choices[0] async for chunk in stream]
    assert [chunk.text for chunk in chunks] == ["abca", "b"]
    assert [len((chunk.logprobs and chunk.logprobs.tokens) or []) for chunk in chunks] == [4, 1]
    assert chunks[1].logprobs is not None and chunks[1].logprobs.text_offset == [4]


async def test_token_ids_come_back_when_asked_for(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(
        model="fake", prompt="ab", max_tokens=3, extra_body={"return_token_ids": True}
    )
    assert reply.choices[0].model_extra is not None
    assert reply.choices[0].model_extra["token_ids"] == [97, 98, 97]
    assert reply.choices[0].model_extra["prompt_token_ids"] == [97, 98]


async def test_a_model_without_a_tokenizer_serves_token_ids(site: Site, client: openai.AsyncOpenAI) -> None:
    site.router.has_tokenizer = False
    reply = await client.completions.create(
        model="fake", prompt=[5, 6], max_tokens=2, logprobs=1, extra_body={"return_token_ids": True}
    )
    assert reply.choices[0].text == ""
    assert reply.choices[0].model_extra is not None and reply.choices[0].model_extra["token_ids"] == [5, 6]
    assert reply.choices[0].logprobs is not None and reply.choices[0].logprobs.tokens == [
        "token_id:5",
        "token_id:6",
    ]
    with pytest.raises(openai.BadRequestError, match="no tokenizer"):
        await client.completions.create(model="fake", prompt="text", max_tokens=2)


async def test_the_habits_of_benchmark_clients_are_accepted(http: httpx.AsyncClient) -> None:
    body = {
        "model": "fake",
        "prompt": "abc",
        "max_tokens": 3,
        "repetition_penalty": 1.0,
        "logprobs": None,
        "stop": None,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    chunks = events((await http.post("/v1/completions", json=body)).text)
    assert chunks[-1] == "[DONE]"
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks[:-1]] == [1, 2, 3, 3]


async def test_many_prompts_of_one_request_reach_the_router_a_few_at_a_time(
    site: Site, client: openai.AsyncOpenAI
) -> None:
    site.router.pace_s = 0.02
    prompts = [[97 + i % 20] for i in range(100)]
    reply = await client.completions.create(model="fake", prompt=prompts, max_tokens=1)
    assert [choice.text for choice in reply.choices] == [chr(prompt[0]) for prompt in prompts]
    assert 1 < site.router.max_running <= 32


# Chat


async def test_a_chat_answers_and_streams_the_same(client: openai.AsyncOpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
    ]
    reply = await client.chat.completions.create(model="fake", messages=messages, max_completion_tokens=6)
    assert reply.choices[0].message.content == "<syste"
    assert (reply.choices[0].message.role, reply.choices[0].finish_reason) == ("assistant", "length")
    stream = await client.chat.completions.create(model="fake", messages=messages, max_tokens=6, stream=True)
    chunks = [chunk.choices[0] async for chunk in stream]
    assert chunks[0].delta.model_dump(exclude_unset=True) == {"role": "assistant", "content": ""}
    assert all(chunk.delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "<syste"
    assert chunks[-1].finish_reason == "length"


async def test_the_chunks_of_a_chat_are_those_of_openai(site: Site, http: httpx.AsyncClient) -> None:
    """The role with empty text, a chunk for each token, and an end without text."""
    site.router.eos_after = 2
    body = {
        "messages": [{"role": "user", "content": "u"}],
        "stream": True,
        "stream_options": {"include_usage": True, "include_obfuscation": False},
    }
    *chunks, usage, done = events((await http.post("/v1/chat/completions", json=body)).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "<"}, {"content": "u"}, {}]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None, None, None, "stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (usage["choices"], done) == ([], "[DONE]")
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_the_reply_of_a_chat_can_be_sent_back(client: openai.AsyncOpenAI, site: Site) -> None:
    first = await client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "u"}], max_tokens=3
    )
    turn: Any = first.choices[0].message.model_dump()
    await client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "u"}, turn], max_tokens=1
    )
    assert [message.role for message in site.router.requests[1].chat.messages] == ["user", "assistant"]


async def test_a_chat_gives_log_probabilities_and_token_ids(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model="fake",
        messages=[{"role": "u", "content": "x"}],  # type: ignore[list-item, misc]
        max_tokens=2,
        logprobs=True,
        top_logprobs=2,
        extra_body={"return_token_ids": True, "chat_template_kwargs": {"a": 1}},
    )
    assert reply.choices[0].logprobs is not None and reply.choices[0].logprobs.content is not None
    token = reply.choices[0].logprobs.content[0]
    assert (token.token, token.bytes, len(token.top_logprobs)) == ("<", [60], 2)
    assert reply.model_extra is not None and reply.model_extra["prompt_token_ids"] == list(b"<u:x>")
    assert reply.choices[0].model_extra is not None and reply.choices[0].model_extra["token_ids"] == [60, 117]


# Other routes


async def test_models_tokens_version_and_state(
    site: Site, http: httpx.AsyncClient, client: openai.AsyncOpenAI
) -> None:
    (model,) = (await client.models.list()).data
    assert model.id == "fake"
    assert model.model_extra == {
        "root": "fake",
        "parent": None,
        "max_model_len": 128,
        "sampling_defaults": {
            "temperature": 0.7,
            "top_p": 1,
            "top_k": 0,
            "min_p": 0,
            "repetition_penalty": 1,
        },
    }
    assert (await client.models.retrieve("fake")).id == "fake"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("org/other")
    tokens = await http.post("/tokenize", json={"model": "fake", "prompt": "ab", "return_token_strs": True})
    assert tokens.json() == {
        "count": 2,
        "max_model_len": 128,
        "tokens": [97, 98],
        "token_strs": ["<97>", "<98>"],
    }
    talk = await http.post("/tokenize", json={"messages": [{"role": "u", "content": "x"}]})
    assert talk.json() == {"count": 5, "max_model_len": 128, "tokens": list(b"<u:x>")}
    assert (await http.post("/detokenize", json={"tokens": [97, 98]})).json() == {"prompt": "ab"}
    assert set((await http.get("/version")).json()) == {"version"}
    health = await http.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    schema = (await http.get("/openapi.json")).json()
    assert "/v1/chat/completions" in schema["paths"]


async def test_openai_without_asyncio_works_too(site: Site) -> None:
    def ask() -> str:
        with openai.OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            stream = client.chat.completions.create(
                model="fake", messages=[{"role": "user", "content": "x"}], max_tokens=4, stream=True
            )
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert await asyncio.to_thread(ask) == "<use"


async def test_fifty_streams_at_once_each_get_their_own_text(client: openai.AsyncOpenAI) -> None:
    async def ask(i: int) -> str:
        stream = await client.completions.create(model="fake", prompt=f"{i}.", max_tokens=i + 1, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    texts = await asyncio.gather(*(ask(i) for i in range(50)))
    assert texts == [(f"{i}." * 51)[: i + 1] for i in range(50)]


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/version", "/v1/models", "/v1/models/fake"])
async def test_what_can_be_read_can_be_asked_for_its_head(http: httpx.AsyncClient, path: str) -> None:
    whole, head = await http.get(path), await http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]
    assert (await http.head("/v1/completions")).status_code == 405
    assert (await http.head("/nowhere")).status_code == 404


async def test_the_root_says_what_is_here(http: httpx.AsyncClient) -> None:
    index = (await http.get("/")).json()
    assert (index["name"], index["version"]) == ("Moesaic", moesaic.__version__)
    assert {"/v1/models", "/v1/chat/completions", "/health"} <= set(index["routes"])
    assert (await http.get(index["openapi"])).status_code == 200


async def test_a_long_list_of_tokens_is_whole(site: Site, http: httpx.AsyncClient) -> None:
    prompt = "héllo " * 20_000
    reply = (await http.post("/tokenize", json={"prompt": prompt, "return_token_strs": True})).json()
    assert reply["tokens"] == encode(prompt)
    assert reply["token_strs"] == [f"<{token_id}>" for token_id in encode(prompt)]
    assert (reply["count"], reply["max_model_len"]) == (len(encode(prompt)), 128)
    assert "token_strs" not in (await http.post("/tokenize", json={"prompt": "a"})).json()
    assert (await http.post("/tokenize", json={"prompt": ""})).json()["tokens"] == []


# Which experts compute an answer

POLICY = {"deny": ["maths-v1", "12:7"], "allow": ["law"], "require": ["law"], "top_k": 4}


async def test_a_policy_goes_through_openais_client_and_comes_back(
    site: Site, client: openai.AsyncOpenAI
) -> None:
    extra = {"experts": POLICY, "return_weight_versions": True, "epoch": "e1", "session_id": "s1"}
    reply = await client.completions.create(
        model="fake", prompt="abc", n=2, max_tokens=3, extra_body=extra, user="somebody"
    )
    (call,) = site.router.requests
    assert call.experts == pb.ExpertPolicy(**POLICY)
    assert (call.epoch, call.session_id, call.return_weight_versions) == ("e1", "s1", True)
    assert reply.model_extra is not None
    assert reply.model_extra["moesaic"] == {"epoch": "e1", "experts": POLICY}
    span = {"version": "e1", "start": 0, "end": 3}
    assert [(choice.model_extra or {})["weight_versions"] for choice in reply.choices] == [[span]] * 2


async def test_a_chat_takes_a_policy_too(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "abc"}],
        max_tokens=2,
        extra_body={"experts": {"deny": ["maths-v1"]}, "return_weight_versions": True},
    )
    assert (reply.model_extra or {})["moesaic"] == {"epoch": "e1", "experts": {"deny": ["maths-v1"]}}
    span = {"version": "e1", "start": 0, "end": 2}
    assert (reply.choices[0].model_extra or {})["weight_versions"] == [span]


@pytest.mark.parametrize("is_chat", [False, True])
async def test_a_stream_says_by_what_it_is_computed_at_its_beginning_and_which_versions_at_its_end(
    http: httpx.AsyncClient, is_chat: bool
) -> None:
    route, prompt = (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "abc"}]})
        if is_chat
        else ("/v1/completions", {"prompt": "abc"})
    )
    body = {
        **prompt,
        "model": "fake",
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "experts": {"deny": ["law"]},
        "return_weight_versions": True,
    }
    *chunks, usage, _done = events((await http.post(route, json=body)).text)
    assert chunks[0]["moesaic"] == {"epoch": "e1", "experts": {"deny": ["law"]}}
    assert not any("moesaic" in chunk for chunk in (*chunks[1:], usage))
    named = [chunk["choices"][0].get("weight_versions") for chunk in chunks]
    assert named == [None] * (len(chunks) - 1) + [[{"version": "e1", "start": 0, "end": 3}]]


async def test_a_policy_is_echoed_only_where_there_is_one_and_versions_where_they_are_asked_for(
    http: httpx.AsyncClient,
) -> None:
    body = {"model": "fake", "prompt": "abc", "max_tokens": 1, "experts": {"deny": []}}
    reply = (await http.post("/v1/completions", json=body)).json()
    assert reply["moesaic"] == {"epoch": "e1"}
    assert "weight_versions" not in reply["choices"][0]


async def test_prompts_of_one_request_are_one_session(site: Site, http: httpx.AsyncClient) -> None:
    body = {"model": "fake", "prompt": ["ab", "cd"], "max_tokens": 1}
    await http.post("/v1/completions", json=body, headers={"x-request-id": "r7"})
    assert [call.session_id for call in site.router.requests] == ["r7", "r7"]
