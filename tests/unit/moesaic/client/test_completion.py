"""Tokens of a stream and whole completions, as a program sees them."""

from __future__ import annotations

from dataclasses import replace

from moesaic.client.completion import Completion, Token, TokenReader
from moesaic.v1 import inference_pb2 as pb

PROMPT = pb.PromptInfo(token_ids=[1, 2], text="ab")


def read(*responses: pb.GenerateResponse) -> list[Token]:
    reader = TokenReader()
    return [token for response in responses if (token := reader.read(response)) is not None]


def last(**fields: object) -> pb.GenerateResponse:
    response = pb.GenerateResponse(finish_reason=pb.FINISH_REASON_LENGTH, **fields)  # type: ignore[arg-type]
    response.usage.completion_tokens = 1
    response.timing.total_s = 1.0
    return response


def test_the_prompt_goes_along_with_the_first_token() -> None:
    tokens = read(pb.GenerateResponse(prompt=PROMPT), pb.GenerateResponse(text="c", token_ids=[3]), last())

    assert [token.token_ids for token in tokens] == [(3,), ()]
    assert [token.prompt is not None for token in tokens] == [True, False]
    assert tokens[0].prompt is not None and tokens[0].prompt.token_ids == (1, 2)


def test_an_answer_without_a_token_has_its_prompt_with_its_end() -> None:
    [end] = read(pb.GenerateResponse(prompt=PROMPT), last())

    assert (end.token_ids, end.finish_reason) == ((), "length")
    assert end.prompt is not None


def test_a_stream_has_begun_with_its_first_token_and_not_with_its_prompt() -> None:
    reader = TokenReader()

    reader.read(pb.GenerateResponse(prompt=PROMPT))
    assert not reader.begun
    reader.read(pb.GenerateResponse(text="c", token_ids=[3]))
    assert reader.begun


def test_reprs_are_short() -> None:
    first, end = read(pb.GenerateResponse(prompt=PROMPT, text="c", token_ids=[3]), last())
    completion = Completion.of([first, end])

    assert repr(first) == "<Token 'c', token_ids=(3,), index=0>"
    assert repr(end) == "<Token '', token_ids=(), index=0, finish_reason='length'>"
    assert repr(completion) == "<Completion 'c', completion_tokens=1, finish_reason='length'>"
    assert len(repr(replace(completion, text="long " * 1000))) < 120
