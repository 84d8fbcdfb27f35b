"""Pieces of an answer become the replies that OpenAI's clients read; streamed and whole ones agree."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.openai import logprobs
from gateway.openai.renderers import ChatRenderer, CompletionRenderer, Identity, degraded_header
from gateway.openai.request_output import Piece, RequestOutput
from gateway.openai.requests import ChatCompletionRequest, CompletionRequest
from moesaic.errors import DataLoss
from moesaic.v1 import inference_pb2 as pb

WHO = Identity("r1", 1_790_000_000)


def token(
    token_id: int, *, text: str = "", index: int = 0, end: bool = False, **fields: Any
) -> pb.GenerateResponse:
    message = pb.GenerateResponse(
        model="m", epoch="e", index=index, text=text, token_ids=[token_id], **fields
    )
    if end:
        message.finish_reason = pb.FINISH_REASON_STOP
        message.usage.CopyFrom(pb.Usage(prompt_tokens=2, completion_tokens=2))
    return message


def entry(token_id: int, value: float | None, text: str, *top: tuple[int, float, str]) -> pb.TokenLogprob:
    alternatives = [pb.Alternative(token_id=i, logprob=lp, text=t) for i, lp, t in top]
    return pb.TokenLogprob(
        token_id=token_id, logprob=value, text=text, token_bytes=text.encode(), top=alternatives
    )


PROMPT = pb.PromptInfo(
    token_ids=[7, 8], text="hi", logprobs=[entry(7, None, "h"), entry(8, -1, "i", (8, -1, "i"))]
)


def test_a_completion_is_its_chunks_put_together() -> None:
    request = CompletionRequest.model_validate(
        {"prompt": "hi", "echo": True, "return_token_ids": True, "stream": True}
    )
    messages = [token(1, text="a", prompt=PROMPT), token(2, text="b", end=True, stop="b")]
    output, renderer = RequestOutput(1, 1), CompletionRenderer(request, WHO)
    pieces = [piece for message in messages if (piece := output.add(0, message))]
    chunks = [
        chunk.model_dump(exclude_unset=True) for piece in pieces for chunk in renderer.chunks(output, piece)
    ]
    whole = CompletionRenderer(request, WHO).reply(output, [pieces]).model_dump(exclude_unset=True)
    (choice,) = whole["choices"]
    assert choice["text"] == "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hiab"
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([1, 2], [7, 8])
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [7, 8]
    assert "prompt_token_ids" not in chunks[1]["choices"][0]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "stop"]
    assert (whole["id"], whole["epoch"], whole["object"]) == ("cmpl-r1", "e", "text_completion")
    assert whole["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_is_counted_per_prompt_and_over_all_choices() -> None:
    output = RequestOutput(2, 2)
    for prompt in (0, 1):
        output.add(prompt, token(1, prompt=PROMPT))
        output.add(prompt, token(2, end=True))
        output.add(prompt, token(3, index=1))
        output.add(prompt, token(4, index=1, end=True))
    output.check_complete()
    assert (output.prompt_tokens, output.completion_tokens) == (4, 8)


def test_cached_tokens_are_those_that_no_choice_had_to_compute() -> None:
    output = RequestOutput(2, 2)
    for prompt, cached in ((0, (16, 48)), (1, (0, 32))):
        for index in (1, 0):
            message = token(1, index=index, end=True)
            message.usage.cached_prompt_tokens = cached[index]
            output.add(prompt, message)
    assert output.cached_tokens == 16


def test_choices_are_numbered_prompt_by_prompt() -> None:
    output = RequestOutput(3, 2)
    piece = output.add(2, token(1, index=1))
    assert piece is not None and piece.index == 5


def test_a_message_with_the_prompt_alone_is_no_piece() -> None:
    output = RequestOutput(1, 1)
    assert output.add(0, pb.GenerateResponse(prompt=PROMPT)) is None
    piece = output.add(0, token(1, text="a"))
    assert piece is not None and piece.is_first and piece.prompt.text == "hi"


def test_an_answer_without_its_end_is_data_loss() -> None:
    output = RequestOutput(1, 1)
    output.add(0, token(1))
    with pytest.raises(DataLoss):
        output.check_complete()


def test_where_the_epoch_changed_between_two_prompts_the_reply_names_both_and_each_choice_its_own() -> None:
    request = CompletionRequest.model_validate({"prompt": ["a", "b"], "return_weight_versions": True})
    output, renderer = RequestOutput(2, 1), CompletionRenderer(request, WHO)
    pieces = []
    for number, epoch in ((1, "new"), (0, "old")):
        message = token(1, end=True, prompt=PROMPT)
        message.epoch = epoch
        message.weight_versions.add(version=epoch, start=0, end=1)
        pieces.append(output.add(number, message))
    new, old = [piece for piece in pieces if piece is not None]
    whole = renderer.reply(output, [[old], [new]]).model_dump(exclude_unset=True)
    assert (whole["epoch"], whole["moesaic"]) == ("old,new", {"epoch": "old,new"})
    assert [choice["weight_versions"][0]["version"] for choice in whole["choices"]] == ["old", "new"]
    chunks = [renderer.chunks(output, piece)[0].model_dump(exclude_unset=True) for piece in (old, new)]
    assert [(chunk["epoch"], chunk["moesaic"]["epoch"]) for chunk in chunks] == [("old",) * 2, ("new",) * 2]


def degraded_pieces(output: RequestOutput) -> list[Piece]:
    word = pb.Degraded(policy=pb.ON_MISSING_SUBSTITUTE, assignments=3)
    more = pb.Degraded(policy=pb.ON_MISSING_SUBSTITUTE, assignments=7)
    messages = [
        token(1, text="a", prompt=PROMPT),
        token(2, text="b", degraded=word),
        token(3, text="c", end=True, degraded=more),
    ]
    return [piece for message in messages if (piece := output.add(0, message))]


@pytest.mark.parametrize("renderer_class", [CompletionRenderer, ChatRenderer])
def test_an_answer_that_is_not_the_full_one_says_so_at_its_end(renderer_class: Any) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
    request_class: Any = ChatCompletionRequest
    if renderer_class is CompletionRenderer:
        request_class, body = CompletionRequest, {"prompt": "hi"}
    output, renderer = RequestOutput(1, 1), renderer_class(request_class.model_validate(body), WHO)
    pieces = degraded_pieces(output)
    whole = renderer.reply(output, [pieces]).model_dump(exclude_unset=True)
    word = {"policy": "substitute", "assignments": 7}
    assert whole["moesaic"] == {"epoch": "e", "degraded": word}
    assert output.degraded is not None and degraded_header(output.degraded) == "substitute; assignments=7"
    chunks = [
        chunk.model_dump(exclude_unset=True) for piece in pieces for chunk in renderer.chunks(output, piece)
    ]
    assert chunks[0]["moesaic"] == {"epoch": "e"}
    assert chunks[-1]["moesaic"] == {"epoch": "e", "degraded": word}
    assert not any("moesaic" in chunk for chunk in chunks[1:-1])


def test_the_degraded_assignments_of_all_choices_are_added_up() -> None:
    output = RequestOutput(1, 2)
    for index in (0, 1):
        word = pb.Degraded(policy=pb.ON_MISSING_RENORMALISE, assignments=4)
        output.add(0, token(1, index=index, end=True, prompt=PROMPT, degraded=word))
    assert output.degraded == pb.Degraded(policy=pb.ON_MISSING_RENORMALISE, assignments=8)


def test_the_word_on_missing_experts_comes_back_as_it_was_sent() -> None:
    output = RequestOutput(1, 1)
    policy = pb.ExpertPolicy(deny=["law"], on_missing=pb.ON_MISSING_WAIT)
    piece = output.add(0, token(1, end=True, prompt=PROMPT, experts=policy))
    renderer = CompletionRenderer(CompletionRequest.model_validate({"prompt": "hi"}), WHO)
    assert piece is not None
    whole = renderer.reply(output, [[piece]]).model_dump(exclude_unset=True)
    assert whole["moesaic"] == {"epoch": "e", "experts": {"deny": ["law"], "on_missing": "wait"}}


def test_the_first_chunk_of_a_chat_names_the_role() -> None:
    request = ChatCompletionRequest.model_validate(
        {"messages": [{"role": "user", "content": "x"}], "stream": True}
    )
    output, renderer = RequestOutput(1, 1), ChatRenderer(request, WHO)
    first = output.add(0, token(1, text="a", prompt=PROMPT))
    last = output.add(0, token(2, text="b", end=True))
    assert first is not None and last is not None
    chunks = [
        c.model_dump(exclude_unset=True) for piece in (first, last) for c in renderer.chunks(output, piece)
    ]
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": "b"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]


@pytest.mark.parametrize(
    ("options", "usages"),
    [
        ({}, [...]),
        ({"include_usage": False}, [...]),
        ({"include_usage": True}, [None]),
        ({"include_usage": True, "continuous_usage_stats": True}, [1]),
    ],
)
def test_usage_in_chunks_is_what_was_asked_for(options: dict[str, bool], usages: list[Any]) -> None:
    request = CompletionRequest.model_validate({"prompt": "x", "stream": True, "stream_options": options})
    output = RequestOutput(1, 1)
    piece = output.add(0, token(1, text="a", prompt=PROMPT))
    assert piece is not None
    (chunk,) = CompletionRenderer(request, WHO).chunks(output, piece)
    usage = chunk.model_dump(exclude_unset=True).get("usage", ...)
    assert [usage["completion_tokens"] if isinstance(usage, dict) else usage] == usages


def test_completion_logprobs_hold_the_best_token_and_the_token_itself() -> None:
    entries = [
        entry(7, None, "ab"),
        entry(8, -2.0, "c", (9, -0.5, "d")),
        entry(9, -1.0, "d", (9, -1.0, "d"), (8, -3.0, "c")),
    ]
    rendered = logprobs.for_completion(entries, 10)
    assert rendered.tokens == ["ab", "c", "d"]
    assert rendered.token_logprobs == [None, -2.0, -1.0]
    assert rendered.top_logprobs == [None, {"d": -0.5, "c": -2.0}, {"d": -1.0, "c": -3.0}]
    assert rendered.text_offset == [10, 12, 13]


def test_no_two_tokens_share_an_entry() -> None:
    rendered = logprobs.for_completion([entry(1, -3.0, "�", (2, -0.5, "�"), (3, -1.0, "x"))], 0)
    assert rendered.top_logprobs == [{"�": -0.5, "x": -1.0, "token_id:1": -3.0}]


def test_parts_of_characters_are_told_apart_by_their_bytes() -> None:
    """As OpenAI's completions spell them; in chats `bytes` tells."""
    emoji = "😀".encode()
    parts = [
        pb.Alternative(token_id=n, logprob=-float(n), text="�", token_bytes=emoji[n - 1 : n]) for n in (1, 2)
    ]
    whole = pb.TokenLogprob(token_id=1, logprob=-1, text="�", token_bytes=emoji[:1], top=parts)
    rendered = logprobs.for_completion([whole, entry(9, -1, "a")], 0)
    assert rendered.tokens == [r"bytes:\xf0", "a"]
    assert rendered.top_logprobs[0] == {r"bytes:\xf0": -1.0, r"bytes:\x9f": -2.0}
    assert rendered.text_offset == [0, 1]
    chat = logprobs.for_chat([whole], 2).content[0]
    assert (chat.bytes, [top.bytes for top in chat.top_logprobs]) == ([0xF0], [[0xF0], [0x9F]])


def test_never_is_a_number_that_json_has() -> None:
    assert logprobs.for_completion([entry(1, float("-inf"), "a")], 0).token_logprobs == [-9999.0]


def test_tokens_without_a_tokenizer_are_spelled_by_their_id() -> None:
    nameless = pb.TokenLogprob(token_id=5, logprob=-1, top=[pb.Alternative(token_id=6, logprob=-0.5)])
    rendered = logprobs.for_completion([nameless], 0)
    assert (rendered.tokens, rendered.top_logprobs) == (
        ["token_id:5"],
        [{"token_id:6": -0.5, "token_id:5": -1.0}],
    )
    chat = logprobs.for_chat([nameless], 1).content[0]
    assert (chat.token, chat.bytes, chat.top_logprobs[0].token) == ("token_id:5", None, "token_id:6")


@pytest.mark.parametrize(
    ("stop", "expected"), [("", None), ("end", "end"), ("42", 42), ("2", None), ("7", "7")]
)
def test_the_stop_reason_is_one_that_the_client_named(stop: str, expected: str | int | None) -> None:
    request = CompletionRequest.model_validate(
        {"prompt": "x", "stop": ["end", "7"], "stop_token_ids": [42, 7]}
    )
    output = RequestOutput(1, 1)
    piece = output.add(0, token(1, end=True, stop=stop))
    assert isinstance(piece, Piece)
    reply = CompletionRenderer(request, WHO).reply(output, [[piece]]).model_dump()
    assert reply["choices"][0]["stop_reason"] == expected
