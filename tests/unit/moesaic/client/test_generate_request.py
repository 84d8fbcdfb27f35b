"""What the client takes as token ids, and how it refuses what it cannot take."""

from __future__ import annotations

import array
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moesaic import Client, SyncClient
from moesaic.client.generate_request import (
    GenerateOptions,
    detokenize_request,
    generate_request,
    tokenize_request,
)
from moesaic.errors import InvalidArgument
from moesaic.v1 import inference_pb2 as pb


class Series:
    """As pandas.Series: indexed by label, without a truth value, and turned into a list by `tolist`."""

    def __init__(self, values: list[Any]) -> None:
        self._values = values

    def __bool__(self) -> bool:
        raise ValueError("the truth value of a Series is ambiguous")

    def __getitem__(self, label: object) -> Any:
        raise KeyError(label)

    def tolist(self) -> list[Any]:
        return self._values


def request(prompt: Any, **options: Any) -> pb.GenerateRequest:
    return generate_request(prompt, 1, None, options)  # type: ignore[arg-type]


ARRAYS: list[Callable[[list[int]], Any]] = [
    list,
    tuple,
    np.array,
    torch.tensor,
    Series,
    lambda ids: array.array("I", ids),
    lambda ids: [np.int64(token_id) for token_id in ids],
    lambda ids: list(torch.tensor(ids)),
    lambda ids: (token_id for token_id in ids),
]


@pytest.mark.parametrize("made", ARRAYS)
def test_token_ids_may_come_in_any_array(made: Callable[[list[int]], Any]) -> None:
    ids = [3, 1, 2]

    assert list(request(made(ids)).token_ids.ids) == ids
    assert list(request("a", decoder_prompt=made(ids)).decoder_prompt) == ids
    assert list(request("a", stop_token_ids=made(ids)).sampling.stop_token_ids) == ids
    assert list(detokenize_request(made(ids)).token_ids) == ids


def test_messages_may_come_in_a_series() -> None:
    messages = Series([{"role": "user", "content": "hello"}])

    assert request(messages).chat.messages[0].content == "hello"
    assert tokenize_request(messages, None).chat.messages[0].content == "hello"  # type: ignore[arg-type]


@pytest.mark.parametrize("made", [bytes, bytearray, lambda ids: memoryview(bytes(ids))])
def test_bytes_are_refused_by_name_wherever_token_ids_are_taken(made: Callable[[list[int]], Any]) -> None:
    for field, call in {
        "prompt": lambda ids: request(ids),
        "decoder_prompt": lambda ids: request("a", decoder_prompt=ids),
        "stop_token_ids": lambda ids: request("a", stop_token_ids=ids),
        "token_ids": detokenize_request,
    }.items():
        with pytest.raises(InvalidArgument, match="must not be bytes") as caught:
            call(made([97, 98]))
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (np.array([[1, 2], [3, 4]]), "prompt must have one dimension: give one prompt a call"),
        ([[1, 2], [3, 4]], "prompt must have one dimension: give one prompt a call"),
        (np.array([1.5]), "prompt must be text, messages, or token ids of at least 0"),
        (np.array(5), "prompt must be a sequence"),
        (None, "prompt must be a sequence"),
        ({"role": "user", "content": "a"}, "prompt must be a list, also where it has one message"),
        (["a", "b"], "prompt must be text, messages, or token ids of at least 0"),
    ],
)
def test_a_prompt_that_is_none_is_refused_with_what_helps(prompt: Any, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        request(prompt)

    assert (caught.value.message, caught.value.field) == (message, "prompt")


@pytest.mark.parametrize(
    "method", [Client.generate, Client.complete, SyncClient.generate, SyncClient.complete]
)
def test_help_shows_every_option_with_its_meaning(method: Callable[..., Any]) -> None:
    options = GenerateOptions.__annotations__
    described = {line.split()[0] for line in (inspect.getdoc(method) or "").splitlines() if "  " in line}

    assert options.keys() <= inspect.signature(method).parameters.keys()
    assert options.keys() == described


def test_help_shows_a_sentence_for_every_method_of_both_clients() -> None:
    for client in (Client, SyncClient):
        methods = {name: it for name, it in vars(client).items() if not name.startswith("_")}

        assert {"generate", "complete", "tokenize", "detokenize", "model_info", "close"} <= methods.keys()
        assert all(method.__doc__ for method in methods.values())
        assert client.__init__.__doc__


def test_both_clients_take_the_same_arguments() -> None:
    for name, method in vars(SyncClient).items():
        if callable(method) and (not name.startswith("_") or name == "__init__"):
            parameters = inspect.signature(method).parameters
            assert parameters == inspect.signature(getattr(Client, name)).parameters
