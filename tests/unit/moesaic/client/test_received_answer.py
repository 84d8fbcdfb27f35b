"""An answer that breaks off, at any message and as often as it likes, against the router's own code for both halves."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.json_format import MessageToDict
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_links import make_epoch
from support.tiny_tokenizer import byte_level, write_folder
from support.views import plain_view

from moesaic.client.received_answer import ReceivedAnswer
from moesaic.errors import DataLoss
from moesaic.v1 import inference_pb2 as pb
from router.api.continuation import Continuation, prompt_message
from router.api.continuations import make_continuations
from router.api.prompt import read_prompt
from router.api.sampling_request import ModelLimits
from router.engine.epoch_tally import EpochTally
from router.engine.live_sequence import LiveSequence
from router.engine.request import SequenceRequest
from router.engine.sampler import sample
from router.engine.sampling_params import SampledToken
from router.text.text import Text, load_text

VOCAB = 420
EOS = 2
# Most tokens are of the first bytes and letters, so that texts have what they are to stop at.
NUM_LIKELY = 100
LIMITS = ModelLimits(max_model_len=64, vocab_size=VOCAB, eos_token_ids=frozenset({EOS}))
VIEW = plain_view(make_epoch(1, 2))


@functools.cache
def text() -> Text:
    with tempfile.TemporaryDirectory() as folder:
        return load_text(write_folder(Path(folder), byte_level()))


def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
    """What a router streams whose model's logits are a function of the tokens so far."""
    prompt = read_prompt(request, text(), LIMITS)
    continuations = make_continuations(request, prompt, text(), LIMITS, request_id="r", model="m")
    for continuation in continuations:
        continuation.epoch = VIEW.epoch.id
    yield from (it.ending for it in continuations if it.ending is not None)
    if not request.HasField("resume"):
        info = prompt_message(prompt.token_ids, prompt.text, text(), None)
        yield continuations[0].message(prompt=info, seed=continuations[0].params.seed)
    steps = [messages(it, prompt.token_ids) for it in continuations if not it.finished]
    for step in zip_longest(*steps, fillvalue=()):
        for responses in step:
            yield from responses


def messages(continuation: Continuation, prompt: tuple[int, ...]) -> Iterator[list[pb.GenerateResponse]]:
    """Step by step, as the engine and the service make them."""
    request = SequenceRequest(
        "s",
        prompt,
        continuation.params,
        time.monotonic() + 60,
        lambda event: None,
        VIEW,
        generated=continuation.received,
    )
    live = LiveSequence(request, EpochTally())
    end = live.reach_end_of_prompt()
    if end is not None:
        yield [continuation.on_finished(end)]
    while not continuation.finished:
        (token,) = sample(logits(live.sequence.tokens), [live.sampling])
        assert isinstance(token, SampledToken)
        yield [continuation.on_token(live.take_token(token))]


def logits(tokens: list[int]) -> torch.Tensor:
    seed = functools.reduce(lambda digest, token: (digest * 31 + token) % 2**31, tokens, 7)
    scores = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    scores[:, 3 + NUM_LIKELY :] -= 6
    return scores


def told(stream: list[pb.GenerateResponse]) -> list[list[dict[str, Any]]]:
    """The messages of each continuation without its times, which no two runs share."""
    found: dict[int, list[dict[str, Any]]] = {}
    for message in stream:
        copy = pb.GenerateResponse()
        copy.CopyFrom(message)
        copy.ClearField("timing")
        found.setdefault(copy.index, []).append(MessageToDict(copy))
    return [found[index] for index in sorted(found)]


def disturbed(request: pb.GenerateRequest, breaks: list[int]) -> list[pb.GenerateResponse]:
    """What a caller gets whose streams break off before these messages."""
    received, stream = ReceivedAnswer(request), list[pb.GenerateResponse]()
    for at in [*breaks, None]:
        if received.complete:
            break
        if not received.begun:
            stream.clear()
        for number, message in enumerate(answer(received.next_request())):
            if number == at:
                break
            received.take(message)
            stream.append(message)
    assert received.complete
    return stream


SAMPLING = st.fixed_dictionaries(
    {"max_tokens": st.integers(0, 20)},
    optional={
        "min_tokens": st.just(0) | st.integers(0, 3),
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 3.0]),
        "top_p": st.sampled_from([0.5, 0.95]),
        "top_k": st.integers(1, 40),
        "presence_penalty": st.sampled_from([-1.0, 1.5]),
        "frequency_penalty": st.sampled_from([0.5, 2.0]),
        "repetition_penalty": st.sampled_from([0.8, 1.4]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        # Most texts have a vowel soon; the others are cut in the middle of what may be a stop string.
        "stop": st.lists(st.sampled_from(["a", "e", "th", "he", "\n", "ou", " "]), min_size=1, max_size=3),
        "stop_token_ids": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
        "logprobs": st.integers(0, 2),
        "ignore_eos": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "include_stop_in_output": st.booleans(),
    },
).filter(lambda given: given.get("min_tokens", 0) <= given["max_tokens"])


@settings(max_examples=100, deadline=None)
@given(sampling=SAMPLING, n=st.integers(1, 3), breaks=st.lists(st.integers(0, 25), max_size=4))
def test_an_answer_that_breaks_off_anywhere_is_the_undisturbed_one(
    sampling: dict[str, Any], n: int, breaks: list[int]
) -> None:
    request = pb.GenerateRequest(text="Once upon", n=n, sampling=pb.SamplingParams(**sampling))
    request.return_weight_versions = True
    stream = disturbed(request, breaks)
    # An absent seed is drawn anew by every run that begins.
    request.sampling.seed = stream[0].seed
    assert told(stream) == told(list(answer(request)))


FEW = [*range(3, 3 + NUM_LIKELY, 2)]


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"max_tokens": 6, "stop_token_ids": FEW, "min_tokens": 2, "seed": 3}, pb.FINISH_REASON_STOP),
        ({"max_tokens": 30, "stop": ["e", "a", "o"], "seed": 4}, pb.FINISH_REASON_STOP),
        ({"max_tokens": 5, "seed": 5, "ignore_eos": True}, pb.FINISH_REASON_LENGTH),
    ],
)
def test_every_way_to_end_is_the_same_behind_every_message(sampling: dict[str, Any], reason: int) -> None:
    request = pb.GenerateRequest(text="Once upon", n=2, sampling=pb.SamplingParams(**sampling))
    undisturbed = list(answer(request))
    assert undisturbed[-1].finish_reason == reason
    for at in range(len(undisturbed)):
        assert told(disturbed(request, [at])) == told(undisturbed)


def test_before_the_first_token_the_request_is_sent_as_it_was() -> None:
    request = pb.GenerateRequest(text="Once", sampling=pb.SamplingParams(max_tokens=3))
    received = ReceivedAnswer(request)
    assert received.next_request() is request
    received.take(next(answer(request)))
    assert received.next_request() is request and not received.begun and not received.complete


def test_a_resumed_request_names_prompt_epoch_seed_and_id_of_the_answer() -> None:
    request = pb.GenerateRequest(text="Once", n=2, tenant="blue", sampling=pb.SamplingParams(max_tokens=3))
    received = ReceivedAnswer(request)
    received.take(
        pb.GenerateResponse(request_id="drawn", epoch="e", seed=5, prompt=pb.PromptInfo(token_ids=[1, 9]))
    )
    received.take(pb.GenerateResponse(request_id="drawn", epoch="e", index=1, token_ids=[4]))
    resumed = received.next_request()
    assert (resumed.request_id, resumed.epoch, resumed.sampling.seed) == ("drawn", "e", 5)
    assert (resumed.WhichOneof("prompt"), list(resumed.token_ids.ids)) == ("token_ids", [1, 9])
    assert (resumed.n, resumed.tenant, resumed.sampling.max_tokens) == (2, "blue", 3)
    assert [list(it.token_ids) for it in resumed.resume.continuations] == [[], [4]]
    assert request == pb.GenerateRequest(
        text="Once", n=2, tenant="blue", sampling=pb.SamplingParams(max_tokens=3)
    )


OPENING = pb.GenerateResponse(epoch="e", prompt=pb.PromptInfo(token_ids=[1]), token_ids=[2])


@pytest.mark.parametrize(
    ("before", "message", "reason"),
    [
        ([OPENING], OPENING, "NOT_RESUMED"),
        ([OPENING], pb.GenerateResponse(epoch="other", token_ids=[3]), "INCOMPLETE_ANSWER"),
        ([], pb.GenerateResponse(epoch="e", token_ids=[3]), "INCOMPLETE_ANSWER"),
    ],
)
def test_what_does_not_belong_to_the_answer_is_refused(
    before: list[pb.GenerateResponse], message: pb.GenerateResponse, reason: str
) -> None:
    received = ReceivedAnswer(pb.GenerateRequest())
    for earlier in before:
        received.take(earlier)
    with pytest.raises(DataLoss) as caught:
        received.take(message)
    assert caught.value.reason == reason
