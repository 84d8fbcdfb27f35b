"""The public service over real gRPC, with a fake engine and a tokenizer made in memory."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.fake_engine import FakeEngine, answer, finished, generates, scores, token
from support.tiny_tokenizer import byte_level, sentencepiece, write_folder

from moesaic import __version__, rpc, telemetry
from moesaic.epoch import Epoch, EpochBundle, ExpertAddress, GateRow
from moesaic.errors import DataLoss, Overloaded, Unavailable, from_rpc_error
from moesaic.routing_table import Canary, RoutingTable, Snapshot
from moesaic.v1 import inference_pb2 as pb
from moesaic.v1 import inference_pb2_grpc
from router.api import event_buffer, generate_call, tokens
from router.api.sampling_defaults import neutral_sampling
from router.api.service import InferenceService, ModelFacts
from router.control.epochs import EpochBook
from router.engine.request import Failed, PromptScored, SequenceEvent, SequenceRequest, Started
from router.gating.policy import LayerShape
from router.text.text import Text, load_text

MAX_MODEL_LEN, VOCAB_SIZE = 512, 420
WAIT_S = 240.0
HIDDEN_SIZE, NUM_SLOTS, TOP_K = 4, 3, 2


def epoch_with(*bundles: str) -> Epoch:
    """Two layers of three slots, and one added slot of layer 1 for each bundle."""
    slots = [(layer, slot) for layer in (0, 1) for slot in range(NUM_SLOTS)]
    added = {name: ExpertAddress(1, NUM_SLOTS + index) for index, name in enumerate(bundles)}
    return Epoch.of(
        "tiny",
        {address: bytes(32) for address in (*map(ExpertAddress._make, slots), *added.values())},
        gate_rows={address: GateRow(bytes(4 * HIDDEN_SIZE)) for address in added.values()},
        bundles=[EpochBundle(name, bytes(32), ("tag",), (address,)) for name, address in added.items()],
    )


CURRENT = epoch_with("maths-v1", "law")
EPOCH = CURRENT.id


def epochs(current: Epoch = CURRENT, canary: Canary | None = None) -> EpochBook:
    """What a router holds whose workers have everything."""
    book = EpochBook({layer: LayerShape(NUM_SLOTS, TOP_K) for layer in (0, 1)}, HIDDEN_SIZE)
    book.update(Snapshot(current, RoutingTable(1, ()), canary))
    book.settle(lambda _: [], {})
    return book


@dataclass
class Rig:
    """A served model, and a client of it."""

    address: str
    engine: FakeEngine
    service: InferenceService
    stub: inference_pb2_grpc.InferenceServiceStub
    text: Text

    def call(self, request: pb.GenerateRequest, **kwargs: Any) -> Any:
        return self.stub.Generate(request, **{"timeout": 20, **kwargs})

    async def generate(self, request: pb.GenerateRequest, **kwargs: Any) -> list[pb.GenerateResponse]:
        return [response async for response in self.call(request, **kwargs)]

    async def error(self, request: pb.GenerateRequest, **kwargs: Any) -> Any:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.generate(request, **kwargs)
        return from_rpc_error(caught.value)

    def ids(self, text: str) -> tuple[int, ...]:
        return self.text.encode(text, add_special_tokens=False)


@asynccontextmanager
async def serving(
    engine: FakeEngine,
    text: Text,
    *,
    request_timeout_s: float = 60.0,
    encodes_prompts: bool = False,
    sampling_defaults: pb.SamplingParams | None = None,
    held: EpochBook | None = None,
) -> AsyncIterator[Rig]:
    service = InferenceService(
        engine,
        text,
        ModelFacts(
            *("tiny", "mixtral", MAX_MODEL_LEN, VOCAB_SIZE, 2, 8, 2),
            created=1_700_000_000,
            encodes_prompts=encodes_prompts,
            sampling_defaults=sampling_defaults or neutral_sampling(),
        ),
        stats=lambda: pb.GetRouterStatsResponse(steps=7),
        epoch=lambda: EPOCH,
        choose_view=(held or epochs()).choose,
        control_address=lambda: "control:1",
        request_timeout_s=request_timeout_s,
        on_missing="wait",
    )
    server = rpc.Server(
        {
            rpc.INFERENCE_SERVICE: lambda s: inference_pb2_grpc.add_InferenceServiceServicer_to_server(
                service, s
            )
        }
    )
    port = await server.start("127.0.0.1", 0)
    try:
        address = f"127.0.0.1:{port}"
        async with rpc.aio_channel(address) as channel:
            yield Rig(address, engine, service, inference_pb2_grpc.InferenceServiceStub(channel), text)
    finally:
        await server.stop(0)
        engine.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return load_text(write_folder(tmp_path_factory.mktemp("byte_level"), byte_level()))


@pytest.fixture(scope="module")
def no_text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    folder = tmp_path_factory.mktemp("bare")
    (folder / "config.json").write_text('{"eos_token_id": 2}')
    return load_text(folder)


@pytest.fixture
async def rig(text: Text) -> AsyncIterator[Rig]:
    """A model that answers " once upon a time" for ever."""
    engine = FakeEngine(generates(text.encode(" once upon a time 😀", add_special_tokens=False)))
    async with serving(engine, text) as rig:
        yield rig


def ask(prompt: str = "Once upon", n: int = 0, **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=prompt, n=n, sampling=pb.SamplingParams(**sampling))


def text_of(responses: Sequence[pb.GenerateResponse], index: int = 0) -> str:
    return "".join(response.text for response in responses if response.index == index)


def last_of(responses: Sequence[pb.GenerateResponse], index: int = 0) -> pb.GenerateResponse:
    return [response for response in responses if response.index == index][-1]


# One answer.


async def test_the_prompt_comes_first_then_one_message_per_token_the_last_with_the_end(rig: Rig) -> None:
    answer = rig.ids(" once upon a time 😀")[:5]
    responses = await rig.generate(ask(max_tokens=5))
    first, *tokens = responses
    last = tokens[-1]
    assert first.prompt == pb.PromptInfo(token_ids=(1, *rig.ids("Once upon")), text="Once upon")
    assert [list(response.token_ids) for response in tokens] == [[token_id] for token_id in answer]
    assert text_of(responses) == rig.text.decode(answer, skip_special_tokens=True)
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert last.stop == ""
    assert last.usage == pb.Usage(prompt_tokens=len(first.prompt.token_ids), completion_tokens=5)
    assert last.timing == pb.Timing(queued_s=0.25, first_token_s=0.5, total_s=1.5)
    assert {(r.model, r.epoch, r.index) for r in responses} == {("tiny", EPOCH, 0)}
    assert not any(response.HasField("prompt") for response in tokens)
    assert not any(r.finish_reason or r.HasField("usage") or r.HasField("timing") for r in tokens[:-1])
    assert rig.engine.cancelled == []


async def test_the_tenant_reaches_the_engine_and_cached_tokens_the_usage(text: Text) -> None:
    async with serving(FakeEngine(lambda request: [Started(0.1, 2), *answer([5])]), text) as rig:
        request = ask(max_tokens=1)
        request.tenant = "blue"
        assert last_of(await rig.generate(request)).usage.cached_prompt_tokens == 2
        assert [sequence.tenant for sequence in rig.engine.requests] == ["blue"]
        request.tenant = "x" * 257
        error = await rig.error(request)
        assert error.code == grpc.StatusCode.INVALID_ARGUMENT and error.field == "tenant"


async def test_the_request_id_is_taken_from_the_field_then_the_metadata_then_drawn(rig: Rig) -> None:
    metadata = (("x-request-id", "from-metadata"),)
    request = ask(max_tokens=1)
    request.request_id = "from.field_1"
    assert {r.request_id for r in await rig.generate(request, metadata=metadata)} == {"from.field_1"}
    request.request_id = ""
    assert {r.request_id for r in await rig.generate(request, metadata=metadata)} == {"from-metadata"}
    (drawn,) = {r.request_id for r in await rig.generate(request)}
    assert len(drawn) == 32
    assert (await rig.error(request, metadata=(("x-request-id", "a b"),))).field == "request_id"
    sequence_ids = {request.sequence_id for request in rig.engine.requests}
    assert len(sequence_ids) == 3
    assert not sequence_ids & {"from.field_1", "from-metadata", drawn}


async def test_a_character_split_over_tokens_comes_whole(text: Text) -> None:
    rocket = [next(i for i in range(3, 300) if text.spell(i)[1] == bytes([byte])) for byte in "🚀".encode()]
    async with serving(FakeEngine(generates([*rocket, *rocket[:2]])), text) as rig:
        _, *tokens = await rig.generate(ask(max_tokens=6))
        assert [response.text for response in tokens] == ["", "", "", "🚀", "", "�"]


async def test_token_ids_are_a_prompt_too(rig: Rig) -> None:
    ids = (1, *rig.ids("Once upon"))
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=pb.SamplingParams(max_tokens=1))
    first, *_ = await rig.generate(request)
    assert first.prompt == pb.PromptInfo(token_ids=ids, text="Once upon")
    assert rig.engine.requests[0].prompt == ids


async def test_special_tokens_are_added_unless_refused(rig: Rig) -> None:
    request = ask(max_tokens=1)
    request.add_special_tokens = False
    (first, *_) = await rig.generate(request)
    assert tuple(first.prompt.token_ids) == rig.ids("Once upon")


async def test_a_model_without_a_tokenizer_serves_token_ids(no_text: Text) -> None:
    async with serving(FakeEngine(generates([5, 6])), no_text) as rig:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[3, 4]), sampling=pb.SamplingParams(max_tokens=2, logprobs=1)
        )
        first, *tokens = await rig.generate(request)
        assert first.prompt == pb.PromptInfo(token_ids=[3, 4])
        assert [(list(r.token_ids), r.text, r.logprobs[0].token_bytes) for r in tokens] == [
            ([5], "", b""),
            ([6], "", b""),
        ]
        assert tokens[-1].usage.completion_tokens == 2
        for refused in (
            ask(),
            chat("hi"),
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), sampling=pb.SamplingParams(stop=["a"])),
        ):
            assert (await rig.error(refused)).code == grpc.StatusCode.UNIMPLEMENTED


async def test_the_continuation_begins_where_the_prompt_ended(tmp_path: Path) -> None:
    text = load_text(write_folder(tmp_path, sentencepiece()))
    hen = text.encode("hen", add_special_tokens=False)
    async with serving(FakeEngine(generates(hen)), text) as rig:
        responses = await rig.generate(ask("a", max_tokens=len(hen)))
        assert responses[0].prompt.text + text_of(responses) == "a hen"


def chat(*contents: str, **fields: Any) -> pb.GenerateRequest:
    roles = ("user", "assistant")
    messages = [pb.ChatMessage(role=roles[i % 2], content=content) for i, content in enumerate(contents)]
    return pb.GenerateRequest(
        chat=pb.Chat(messages=messages, **fields), sampling=pb.SamplingParams(max_tokens=1)
    )


async def test_a_conversation_goes_through_the_template(rig: Rig) -> None:
    (first, *_) = await rig.generate(chat("Hi"))
    assert first.prompt.text == "<s>[user]Hi</s>[assistant]"
    assert first.prompt.token_ids[0] == 1
    assert list(first.prompt.token_ids).count(1) == 1
    (first, *_) = await rig.generate(chat("Hi", add_generation_prompt=False))
    assert first.prompt.text == "<s>[user]Hi</s>"
    (first, *_) = await rig.generate(chat("Hi", "Well", continue_final_message=True))
    assert first.prompt.text == "<s>[user]Hi</s>[assistant]Well"
    (first, *_) = await rig.generate(chat("Hi", template_kwargs={"mood": [1, 2.5, True, None, {"a": "b"}]}))
    assert first.prompt.text == "<s>[user]Hi</s>([1, 2.5, True, None, {'a': 'b'}])[assistant]"


# Several answers.


async def test_n_continuations_have_their_own_seeds_and_interleave(rig: Rig) -> None:
    responses = await rig.generate(ask(n=3, max_tokens=4, seed=40))
    assert [request.sampling.seed for request in rig.engine.requests] == [40, 41, 42]
    assert len({text_of(responses, index) for index in range(3)}) == 1
    for index in range(3):
        assert last_of(responses, index).usage.completion_tokens == 4
    assert sum(response.HasField("prompt") for response in responses) == 1
    assert responses[0].HasField("prompt")
    assert len(responses) == 1 + 3 * 4


async def test_a_seed_is_drawn_once_for_all_continuations(rig: Rig) -> None:
    await rig.generate(ask(n=2, max_tokens=1))
    await rig.generate(ask(max_tokens=1))
    first, second, third = (request.sampling.seed for request in rig.engine.requests)
    assert second == first + 1
    assert third not in (first, second)


async def test_all_continuations_are_admitted_or_none(rig: Rig) -> None:
    rig.engine.script = None
    rig.engine.num_places = 2
    rig.engine.refusal = Overloaded("full", reason="QUEUE_FULL", retry_after_s=2.5)
    error = await rig.error(ask(n=3))
    assert (error.code, error.reason, error.retry_after_s) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "QUEUE_FULL",
        2.5,
    )
    assert rig.engine.open == set()
    assert len(rig.engine.cancelled) == 2


async def test_a_refusal_names_when_to_come_again_and_waits_for_no_step(text: Text) -> None:
    release = threading.Event()

    def stuck(request: SequenceRequest) -> Iterator[SequenceEvent]:
        release.wait(WAIT_S)
        yield from generates([5])(request)

    async with serving(FakeEngine(stuck), text) as rig:
        try:
            rig.engine.num_places = 1
            rig.engine.refusal = Overloaded("late", reason="DEADLINE_UNREACHABLE", retry_after_s=7.0)
            first = rig.call(ask(max_tokens=1))
            await rig.engine.until(lambda engine: bool(engine.open))
            error = await rig.error(ask(max_tokens=1))
            assert (error.code, error.reason, error.retry_after_s) == (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "DEADLINE_UNREACHABLE",
                7.0,
            )
        finally:
            release.set()
        assert [response async for response in first], "the one that was let in is answered"


async def test_the_failure_of_one_continuation_fails_the_call_and_ends_the_others(rig: Rig) -> None:
    rig.engine.script = None
    call = rig.call(ask(n=3))
    await rig.engine.until(lambda engine: len(engine.requests) == 3)
    rig.engine.emit(0, token(5))
    rig.engine.emit(1, token(5), Failed(DataLoss("not finite", reason="NON_FINITE_LOGITS")))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    error = from_rpc_error(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.DATA_LOSS, "NON_FINITE_LOGITS")
    await rig.engine.until(lambda engine: not engine.open)
    assert {rig.engine.requests[0].sequence_id, rig.engine.requests[2].sequence_id} <= set(
        rig.engine.cancelled
    )


# Stopping.


async def test_a_stop_string_across_tokens_cuts_the_text_and_ends_the_sequence(text: Text) -> None:
    answer = [text.encode(part, add_special_tokens=False) for part in ("and so it", " en", "ds", " here")]
    flat = [token_id for part in answer for token_id in part]
    async with serving(FakeEngine(generates(flat)), text) as rig:
        responses = await rig.generate(ask(stop=["ends", "never"], max_tokens=100))
        last = responses[-1]
        num_tokens = sum(map(len, answer[:3]))
        assert text_of(responses) == "and so it "
        assert (last.finish_reason, last.stop) == (pb.FINISH_REASON_STOP, "ends")
        assert last.usage.completion_tokens == num_tokens
        assert sum(len(response.token_ids) for response in responses) == num_tokens
        assert 0 <= last.timing.first_token_s <= last.timing.total_s < 10
        assert rig.engine.cancelled == [rig.engine.requests[0].sequence_id]

        kept = await rig.generate(ask(stop=["ends"], max_tokens=100, include_stop_in_output=True))
        assert text_of(kept) == "and so it ends"


async def test_one_continuation_stops_by_its_text_while_another_goes_on(rig: Rig) -> None:
    rig.engine.script = None
    call = rig.call(ask(n=2, stop=["hen"]))
    await rig.engine.until(lambda engine: len(engine.requests) == 2)
    rig.engine.emit(0, *map(token, rig.ids(" a hen")), *map(token, rig.ids(" more")))
    await rig.engine.until(lambda engine: len(engine.cancelled) == 1)
    rig.engine.emit(1, *answer(rig.ids(" a cat")))
    responses = [response async for response in call]
    assert [text_of(responses, index) for index in range(2)] == [" a ", " a cat"]
    assert [last_of(responses, index).stop for index in range(2)] == ["hen", ""]


async def test_text_held_back_for_a_stop_string_comes_with_the_end(rig: Rig) -> None:
    answer = rig.text.decode(rig.ids(" once upon a time 😀")[:3], skip_special_tokens=True)
    responses = await rig.generate(ask(stop=[answer[-2:] + "!"], max_tokens=3))
    assert text_of(responses) == answer
    assert last_of(responses).text == answer[-2:]
    assert last_of(responses).finish_reason == pb.FINISH_REASON_LENGTH


async def test_stop_strings_wait_for_min_tokens(text: Text) -> None:
    a = text.encode("a", add_special_tokens=False)
    async with serving(FakeEngine(generates(a)), text) as rig:
        responses = await rig.generate(ask(stop=["a"], min_tokens=4, max_tokens=9))
        assert last_of(responses).usage.completion_tokens == 4
        assert text_of(responses) == "aaa"


async def test_a_stop_token_ends_the_text_before_itself(rig: Rig) -> None:
    upon, eos = rig.ids(" hen")[0], 2
    rig.engine.script = generates([upon, upon, eos])
    responses = await rig.generate(ask(max_tokens=9, skip_special_tokens=False))
    last = last_of(responses)
    assert text_of(responses) == rig.text.spell(upon)[0] * 2
    # The end of the sequence is nobody's stop token.
    assert (last.finish_reason, last.stop, last.usage.completion_tokens) == (pb.FINISH_REASON_STOP, "", 3)
    assert list(last.token_ids) == [eos]

    responses = await rig.generate(ask(max_tokens=9, stop_token_ids=[upon]))
    assert (text_of(responses), last_of(responses).stop) == ("", str(upon))
    responses = await rig.generate(ask(max_tokens=9, stop_token_ids=[upon], include_stop_in_output=True))
    assert text_of(responses) == rig.text.spell(upon)[0]


async def test_the_end_of_the_sequence_can_be_ignored(rig: Rig) -> None:
    rig.engine.script = generates([2])
    responses = await rig.generate(ask(max_tokens=5, ignore_eos=True))
    assert last_of(responses).usage.completion_tokens == 5
    assert last_of(responses).finish_reason == pb.FINISH_REASON_LENGTH


async def test_without_max_tokens_the_rest_of_the_context_is_used(rig: Rig) -> None:
    responses = await rig.generate(ask())
    usage = last_of(responses).usage
    assert usage.prompt_tokens + usage.completion_tokens == MAX_MODEL_LEN


async def test_a_silent_request_is_sampled_as_the_models_makers_say(text: Text) -> None:
    defaults = pb.SamplingParams(temperature=0.5, top_p=0.75, top_k=7, min_p=0.125, repetition_penalty=1.5)
    async with serving(FakeEngine(generates([5])), text, sampling_defaults=defaults) as rig:
        info = await rig.stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=60)
        assert info.sampling_defaults == defaults
        await rig.generate(ask(max_tokens=1))
        await rig.generate(ask(max_tokens=1, temperature=0, top_k=0, top_p=1))
    silent, own = (request.sampling for request in rig.engine.requests)
    assert (silent.temperature, silent.top_p, silent.top_k, silent.min_p) == (0.5, 0.75, 7, 0.125)
    assert (own.temperature, own.top_p, own.top_k, own.min_p) == (0, 1, 0, 0.125)
    assert silent.repetition_penalty == own.repetition_penalty == 1.5


# Log probabilities.


async def test_tokens_come_with_their_log_probabilities_and_bytes(text: Text) -> None:
    half = next(i for i in range(3, 300) if text.spell(i)[1] == b"\xf0")
    async with serving(FakeEngine(generates([half])), text) as rig:
        _, generated = await rig.generate(ask(max_tokens=1, logprobs=2))
        (entry,) = generated.logprobs
        assert (entry.token_id, entry.logprob, entry.text, entry.token_bytes) == (half, -0.25, "�", b"\xf0")
        assert [(top.token_id, top.logprob, top.text, top.token_bytes) for top in entry.top] == [
            (0, 0, "<unk>", b"<unk>"),
            (1, -0.25, "<s>", b"<s>"),
        ]


async def test_a_prompt_is_scored_without_generating(rig: Rig) -> None:
    responses = await rig.generate(ask(max_tokens=0, prompt_logprobs=1))
    prompt = responses[0].prompt
    assert len(responses) == 2
    assert last_of(responses).usage.completion_tokens == 0
    assert [entry.token_id for entry in prompt.logprobs] == list(prompt.token_ids)
    assert not prompt.logprobs[0].HasField("logprob")
    assert [entry.logprob for entry in prompt.logprobs[1:3]] == [-0.25, -0.5]
    assert all(len(entry.top) == 1 for entry in prompt.logprobs[1:])


async def test_a_long_prompt_is_scored_too(rig: Rig) -> None:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[5] * 400), sampling=pb.SamplingParams(max_tokens=0, prompt_logprobs=20)
    )
    (first, _) = await rig.generate(request)
    assert len(first.prompt.logprobs) == 400


async def test_the_prompt_and_its_scores_come_before_all_tokens_of_all_continuations(rig: Rig) -> None:
    rig.engine.script = None
    call = rig.call(ask(n=2, max_tokens=1, prompt_logprobs=0))
    await rig.engine.until(lambda engine: len(engine.requests) == 2)
    assert [request.sampling.prompt_logprobs for request in rig.engine.requests] == [0, None]
    rig.engine.emit(1, *answer([5]))
    prompt = rig.engine.requests[0].prompt
    rig.engine.emit(0, PromptScored(tuple(scores(prompt[1:], 0))), *answer([6]))
    responses = [response async for response in call]
    assert len(responses[0].prompt.logprobs) == len(prompt)
    assert [list(r.token_ids) for r in responses if r.token_ids and r.index == 1] == [[5]]
    assert [list(r.token_ids) for r in responses if r.token_ids and r.index == 0] == [[6]]


# Ends that nobody wished for.


async def test_a_client_that_cancels_frees_all_its_sequences(rig: Rig) -> None:
    rig.engine.script = None
    call = rig.call(ask(n=3))
    await rig.engine.until(lambda engine: len(engine.open) == 3)
    rig.engine.emit(0, token(5))
    await call.read()
    call.cancel()
    await rig.engine.until(lambda engine: not engine.open)
    assert sorted(rig.engine.cancelled) == sorted(request.sequence_id for request in rig.engine.requests)


async def test_a_client_that_cancels_without_reading_frees_its_sequences(rig: Rig) -> None:
    rig.engine.script = generates(rig.ids(" once upon a time"))
    call = rig.call(ask(n=64))
    await rig.engine.until(lambda engine: len(engine.requests) == 64)
    call.cancel()
    await rig.engine.until(lambda engine: not engine.open)


async def test_a_client_that_disconnects_frees_its_sequences(text: Text) -> None:
    async with serving(FakeEngine(), text) as rig:
        async with rpc.aio_channel(rig.address) as channel:
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(ask(), timeout=60)
            await rig.engine.until(lambda engine: len(engine.open) == 1)
        assert call.done()
        await rig.engine.until(lambda engine: not engine.open)


async def test_a_deadline_reaches_the_engine_and_ends_the_call(rig: Rig) -> None:
    rig.engine.script = None
    clock = asyncio.get_running_loop().time
    for timeout_s in (0.2, 2.0, 20.0):
        before_s = clock()
        error = await rig.error(ask(), timeout=timeout_s)
        assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED
        if rig.engine.requests:
            break  # a busy machine may let a short deadline pass before the call arrives
    assert before_s < rig.engine.requests[0].deadline_s <= clock() + timeout_s
    await rig.engine.until(lambda engine: not engine.open)


async def test_a_call_without_a_deadline_gets_the_default(text: Text) -> None:
    async with serving(FakeEngine(), text, request_timeout_s=0.1) as rig:
        error = await rig.error(ask(n=2), timeout=None)
        assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert error.message == "deadline passed after 0 tokens"
        assert rig.engine.open == set()


async def test_a_client_that_never_reads_is_cut_off(
    text: Text, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(generate_call, "UNREAD_GRACE_S", 0.1)
    async with serving(FakeEngine(generates([5])), text, request_timeout_s=0.4) as rig:
        calls_before = len(asyncio.all_tasks())
        call = rig.call(ask("Once upon " * 20, n=64, logprobs=20), timeout=None)
        with caplog.at_level(logging.INFO, generate_call.__name__):
            await rig.engine.until(lambda _: "request ended" in caplog.text, WAIT_S)
        reason = await cut_off(call)
        # The second one where the machine was too busy for a first token within the deadline.
        assert reason in ("deadline passed, the answer was not read", "deadline passed after 0 tokens")
        assert rig.engine.open == set()
        await rig.engine.until(lambda _: len(asyncio.all_tasks()) <= calls_before, WAIT_S)


async def test_a_call_has_begun_before_its_first_message_so_that_it_can_be_cut_off_in_the_middle_of_that(
    rig: Rig,
) -> None:
    """gRPC refuses to abort a call while its first message carries the metadata."""
    rig.engine.script = None
    call = rig.call(ask(prompt_logprobs=1), timeout=WAIT_S)
    async with asyncio.timeout(WAIT_S):
        await call.initial_metadata()
    assert rig.engine.requests and not call.done()
    call.cancel()


async def test_a_client_that_stops_reading_is_cut_off_long_before_its_deadline(
    text: Text, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (event_buffer, generate_call):
        monkeypatch.setattr(module, "UNREAD_TIMEOUT_S", 0.1)
    async with serving(FakeEngine(generates([5])), text, request_timeout_s=2 * WAIT_S) as rig:
        calls_before = len(asyncio.all_tasks())
        call = rig.call(ask(n=64, max_tokens=240, logprobs=20), timeout=None)
        with caplog.at_level(logging.INFO, generate_call.__name__):
            await rig.engine.until(lambda _: "request ended" in caplog.text, WAIT_S)
        assert await cut_off(call) == "the answer was not read for 0 s"
        assert rig.engine.open == set()
        await rig.engine.until(lambda _: len(asyncio.all_tasks()) <= calls_before, WAIT_S)


def resumed(*received: tuple[Sequence[int], bool], **sampling: Any) -> pb.GenerateRequest:
    """The request for the rest of an answer. `received`: the tokens of each continuation, and whether it has ended."""
    request = ask(n=len(received), **{"temperature": 0, **sampling})
    request.epoch = EPOCH
    for token_ids, finished_ in received:
        request.resume.continuations.add(token_ids=token_ids, finished=finished_)
    return request


async def test_a_resumed_answer_goes_on_behind_what_the_caller_has(rig: Rig) -> None:
    ids = rig.ids(" once upon a time 😀")[:5]
    rig.engine.script = lambda request: [Started(0.1, 99), *answer(ids[2:])]
    responses = await rig.generate(resumed((ids[:2], False), (ids[:3], True), max_tokens=5))
    assert [list(response.token_ids) for response in responses] == [[it] for it in ids[2:]]
    before, whole = (rig.text.decode(it, skip_special_tokens=True) for it in (ids[:2], ids))
    assert before + text_of(responses) == whole
    assert not any(response.HasField("prompt") for response in responses)
    prompt = (1, *rig.ids("Once upon"))
    usage = last_of(responses).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 5)
    assert usage.cached_prompt_tokens == len(prompt)
    (sequence,) = rig.engine.requests
    assert (sequence.prompt, sequence.generated) == (prompt, tuple(ids[:2]))


async def test_a_resumed_answer_does_not_score_its_prompt_again(rig: Rig) -> None:
    request = resumed(([5], False), max_tokens=2, prompt_logprobs=1)
    await rig.generate(request)
    assert rig.engine.requests[0].sampling.prompt_logprobs is None


async def test_what_lacks_its_end_alone_gets_it_without_the_engine(rig: Rig) -> None:
    (last,) = await rig.generate(resumed(([5, 6], False), max_tokens=2))
    assert (last.finish_reason, last.usage.completion_tokens) == (pb.FINISH_REASON_LENGTH, 2)
    assert not last.token_ids and rig.engine.requests == []


async def test_the_first_message_tells_the_seed_that_a_resumed_request_has_to_name(rig: Rig) -> None:
    first, *_ = await rig.generate(ask(max_tokens=1, seed=-7))
    assert first.seed == -7
    first, *rest = await rig.generate(ask(max_tokens=1))
    assert first.HasField("seed") and not any(response.HasField("seed") for response in rest)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda request: request.resume.continuations.add(), "resume"),
        (lambda request: request.resume.continuations[0].token_ids.append(VOCAB_SIZE), "resume"),
        (lambda request: request.resume.continuations[0].token_ids.extend([5] * 9), "resume"),
        (lambda request: request.ClearField("epoch"), "epoch"),
        (lambda request: setattr(request, "epoch", "0123456789abcdef"), "epoch"),
        (lambda request: setattr(request.sampling, "temperature", 1.0), "seed"),
    ],
)
async def test_a_resumed_request_that_does_not_say_all_it_takes_is_refused(
    rig: Rig, change: Any, field: str
) -> None:
    request = resumed(([5], False), max_tokens=8)
    change(request)
    assert (await rig.error(request)).field == field
    assert rig.engine.requests == []


async def test_a_call_is_paused_while_its_client_does_not_read_and_resumed_when_it_does(text: Text) -> None:
    async with serving(FakeEngine(), text) as rig:
        call = rig.call(ask(n=64, max_tokens=240, logprobs=20), timeout=WAIT_S)
        await rig.engine.until(lambda engine: len(engine.requests) == 64, WAIT_S)
        ids = {request.sequence_id for request in rig.engine.requests}
        assert {(request.tenant, request.call) for request in rig.engine.requests} == {
            ("", rig.engine.requests[0].sequence_id)
        }
        for index in range(64):
            rig.engine.emit(index, *(token(5, scores([5], 20)[0]) for _ in range(240)))
        await rig.engine.until(lambda engine: len(engine.pauses) == 64, WAIT_S)
        assert set(rig.engine.pauses) == {(name, True) for name in ids}
        num_tokens = 0
        async for response in call:
            num_tokens += len(response.token_ids)
            if num_tokens == 64 * 240:
                break
        await rig.engine.until(lambda engine: len(engine.pauses) == 128, WAIT_S)
        assert set(rig.engine.pauses[64:]) == {(name, False) for name in ids}
        for index in range(64):
            rig.engine.emit(index, finished())
        assert len([response async for response in call]) == 64


async def cut_off(call: Any) -> str:
    """Reads what is left of a call that the server ends, and returns why it did."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(WAIT_S):
            async for _ in call:
                pass
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    details: str = caught.value.details()
    return details


async def test_an_unexpected_error_is_internal_and_the_service_lives_on(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.engine.refusal = RuntimeError("secret path /model")
    with caplog.at_level(logging.CRITICAL):
        error = await rig.error(ask())
    assert (error.code, error.message) == (grpc.StatusCode.INTERNAL, "internal error")
    rig.engine.refusal = None
    assert len(await rig.generate(ask(max_tokens=1))) == 2


async def test_a_draining_service_finishes_what_runs_and_refuses_the_rest(rig: Rig) -> None:
    rig.engine.script = None
    running = rig.call(ask())
    await rig.engine.until(lambda engine: len(engine.open) == 1)
    rig.service.drain()
    error = await rig.error(ask())
    assert (error.code, error.reason, error.retry_after_s) == (grpc.StatusCode.UNAVAILABLE, "DRAINING", 1.0)
    with pytest.raises(grpc.aio.AioRpcError):
        await rig.stub.Tokenize(pb.TokenizeRequest(text="a"), timeout=60)
    rig.engine.emit(0, *answer(rig.ids(" a hen")))
    assert text_of([response async for response in running]) == " a hen"
    assert (await rig.stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=60)).model == "tiny"


async def test_an_empty_prompt_is_what_the_tokenizer_begins_a_text_with(rig: Rig) -> None:
    first, *_ = await rig.generate(ask("", max_tokens=1))
    assert list(first.prompt.token_ids) == [1]


async def test_the_engines_refusal_reaches_the_client(rig: Rig) -> None:
    rig.engine.refusal = Unavailable("stopping", reason="STOPPING", retry_after_s=1.0)
    assert (await rig.error(ask())).reason == "STOPPING"


async def test_fifty_streams_at_once_each_get_their_own_text(rig: Rig) -> None:
    words = ["hen", "cat", "naïve", "東京", "😀 😀", "a time"]

    def script(request: Any) -> Any:
        said = words[request.sampling.seed % len(words)] * (1 + request.sampling.seed % 5)
        return generates([*rig.ids(said), 2])(request)

    rig.engine.script = script
    answers = await asyncio.gather(*(rig.generate(ask(seed=seed)) for seed in range(50)))
    for seed, responses in enumerate(answers):
        assert text_of(responses) == words[seed % len(words)] * (1 + seed % 5)
        assert last_of(responses).finish_reason == pb.FINISH_REASON_STOP


# Which experts compute a request, and in which epoch.


def choosing(*, n: int = 1, max_tokens: int = 3, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="Once upon", n=n, sampling=pb.SamplingParams(max_tokens=max_tokens), **fields
    )


async def test_a_policy_reaches_the_engine_as_a_view_and_comes_back_first(rig: Rig) -> None:
    policy = pb.ExpertPolicy(deny=["maths-v1", "0:2"], require=["law"], top_k=1)
    responses = await rig.generate(choosing(experts=policy))
    (request,) = rig.engine.requests
    assert request.view.key != EPOCH
    assert {layer: (gate.slots, gate.top_k) for layer, gate in request.view.gates.items()} == {
        0: ((0, 1), 1),
        1: ((0, 1, 2, 4), 1),
    }
    assert responses[0].experts == policy
    assert not any(response.HasField("experts") for response in responses[1:])


@pytest.mark.parametrize("fields", [{}, {"experts": pb.ExpertPolicy()}])
async def test_a_request_that_restricts_nothing_is_computed_by_the_whole_epoch(
    rig: Rig, fields: dict[str, Any]
) -> None:
    responses = await rig.generate(choosing(**fields))
    assert rig.engine.requests[0].view.key == EPOCH
    assert not any(response.HasField("experts") for response in responses)


async def test_a_policy_that_is_scored_with_its_prompt_comes_with_the_scores(rig: Rig) -> None:
    request = choosing(experts=pb.ExpertPolicy(deny=["law"]))
    request.sampling.prompt_logprobs = 1
    first, *_ = await rig.generate(request)
    assert first.experts.deny == ["law"] and len(first.prompt.logprobs) == len(first.prompt.token_ids)


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        (None, "wait"),
        (pb.ExpertPolicy(deny=["law"]), "wait"),
        (pb.ExpertPolicy(on_missing=pb.ON_MISSING_FAIL), "fail"),
        (pb.ExpertPolicy(deny=["law"], on_missing=pb.ON_MISSING_SUBSTITUTE), "substitute"),
    ],
)
async def test_what_happens_where_an_expert_is_missing_is_as_the_request_or_else_the_router_says(
    rig: Rig, experts: pb.ExpertPolicy | None, expected: str
) -> None:
    responses = await rig.generate(choosing(experts=experts))
    assert [request.on_missing for request in rig.engine.requests] == [expected]
    assert responses[0].HasField("experts") == (experts is not None)
    assert not any(response.HasField("degraded") for response in responses)


async def test_a_degraded_answer_says_so_from_the_token_on_and_in_the_trailer(rig: Rig) -> None:
    def script(request: Any) -> Any:
        yield Started(0.0)
        for token_id, num_degraded in ((1, 0), (2, 3)):
            yield replace(token(token_id), num_degraded=num_degraded)
        yield replace(token(3, end=finished()), num_degraded=5)

    rig.engine.script = script
    word = pb.ExpertPolicy(on_missing=pb.ON_MISSING_RENORMALISE)
    call = rig.call(choosing(n=2, experts=word))
    responses = [response async for response in call]
    of_first = [response for response in responses if response.index == 0 and response.token_ids]
    assert [response.degraded.assignments for response in of_first] == [0, 3, 5]
    assert not of_first[0].HasField("degraded")
    assert of_first[2].degraded.policy == pb.ON_MISSING_RENORMALISE
    trailers = dict(await call.trailing_metadata() or ())
    assert trailers[rpc.DEGRADED_TRAILER] == "renormalise; assignments=10"


async def test_a_full_answer_has_no_such_trailer(rig: Rig) -> None:
    call = rig.call(choosing())
    _ = [response async for response in call]
    assert rpc.DEGRADED_TRAILER not in dict(await call.trailing_metadata() or ())


async def test_the_end_of_each_continuation_names_the_versions_of_its_tokens(rig: Rig) -> None:
    responses = await rig.generate(choosing(n=2, return_weight_versions=True))
    for index in (0, 1):
        *earlier, last = (response for response in responses if response.index == index)
        assert list(last.weight_versions) == [pb.WeightVersion(version=EPOCH, start=0, end=3)]
        assert not any(response.weight_versions for response in earlier)


async def test_versions_are_named_where_they_are_asked_for_and_where_there_are_tokens(rig: Rig) -> None:
    for request in (choosing(), choosing(max_tokens=0, return_weight_versions=True)):
        assert not last_of(await rig.generate(request)).weight_versions


async def test_a_stop_string_leaves_the_versions_of_the_tokens_that_were_sampled(rig: Rig) -> None:
    request = choosing(max_tokens=9, return_weight_versions=True)
    request.sampling.stop.append("upon")
    last = last_of(await rig.generate(request))
    assert [span.end for span in last.weight_versions] == [last.usage.completion_tokens]


async def test_all_continuations_share_one_epoch_and_a_session_keeps_its_side_of_a_canary(text: Text) -> None:
    trial = epoch_with("maths-v2")
    held = epochs(canary=Canary(trial, share=0.5))
    engine = FakeEngine(generates([1]))
    async with serving(engine, text, held=held) as rig:
        sides = {}
        for session in map(str, range(20)):
            calls = [choosing(n=3, session_id=session, request_id=f"r{session}-{i}") for i in range(2)]
            answers = [response.epoch for call in calls for response in await rig.generate(call)]
            assert len(set(answers)) == 1
            sides[session] = answers[0]
    assert set(sides.values()) == {EPOCH, trial.id}


async def test_a_request_may_name_its_epoch(text: Text) -> None:
    trial = epoch_with("maths-v2")
    async with serving(FakeEngine(generates([1])), text, held=epochs(canary=Canary(trial, share=0.0))) as rig:
        request = choosing(epoch=trial.id, experts=pb.ExpertPolicy(require=["maths-v2"]))
        assert {response.epoch for response in await rig.generate(request)} == {trial.id}


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"experts": {"deny": ["a", "b", ""]}}, grpc.StatusCode.INVALID_ARGUMENT, "experts.deny[2]"),
        ({"experts": {"deny": ["12:"]}}, grpc.StatusCode.INVALID_ARGUMENT, "experts.deny[0]"),
        ({"experts": {"deny": ["a"] * 257}}, grpc.StatusCode.INVALID_ARGUMENT, "experts.deny"),
        ({"experts": {"allow": ["x" * 257]}}, grpc.StatusCode.INVALID_ARGUMENT, "experts.allow[0]"),
        ({"experts": {"allow": ["law", "who"]}}, grpc.StatusCode.INVALID_ARGUMENT, "experts.allow[1]"),
        ({"experts": {"require": ["who"]}}, grpc.StatusCode.FAILED_PRECONDITION, "experts.require"),
        ({"experts": {"deny": ["0:0", "0:1", "0:2"]}}, grpc.StatusCode.INVALID_ARGUMENT, "experts.deny"),
        ({"experts": {"top_k": 0}}, grpc.StatusCode.INVALID_ARGUMENT, "experts.top_k"),
        ({"experts": {"top_k": TOP_K + 1}}, grpc.StatusCode.INVALID_ARGUMENT, "experts.top_k"),
        ({"epoch": "gone"}, grpc.StatusCode.FAILED_PRECONDITION, "epoch"),
        ({"session_id": "x" * 257}, grpc.StatusCode.INVALID_ARGUMENT, "session_id"),
    ],
)
async def test_experts_and_epochs_that_cannot_be_had_are_refused_by_name(
    rig: Rig, fields: dict[str, Any], code: grpc.StatusCode, field: str
) -> None:
    error = await rig.error(choosing(**fields))
    assert (error.code, error.field) == (code, field)
    assert error.message.startswith(f"{field}: ")
    assert rig.engine.requests == []


async def test_a_denial_of_what_the_epoch_does_not_have_is_fulfilled_already(rig: Rig) -> None:
    responses = await rig.generate(choosing(experts=pb.ExpertPolicy(deny=["who", "7:7"])))
    assert responses[0].experts.deny == ["who", "7:7"]
    assert rig.engine.requests[0].view.key == EPOCH


# Bad input: every row with its status, field and reason; the engine never hears of it.

CODE = grpc.StatusCode


@pytest.mark.parametrize(
    ("request_", "code", "field", "reason"),
    [
        (pb.GenerateRequest(), CODE.INVALID_ARGUMENT, "prompt", "INVALID_ARGUMENT"),
        (
            pb.GenerateRequest(text="", add_special_tokens=False),
            CODE.INVALID_ARGUMENT,
            "prompt",
            "INVALID_ARGUMENT",
        ),
        (ask("a\0b"), CODE.INVALID_ARGUMENT, "prompt", "INVALID_ARGUMENT"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), CODE.INVALID_ARGUMENT, "prompt", "INVALID_ARGUMENT"),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, VOCAB_SIZE])),
            CODE.INVALID_ARGUMENT,
            "prompt",
            "INVALID_ARGUMENT",
        ),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1])),
            CODE.INVALID_ARGUMENT,
            "prompt",
            "INVALID_ARGUMENT",
        ),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 513)),
            CODE.INVALID_ARGUMENT,
            "prompt",
            "CONTEXT_LENGTH_EXCEEDED",
        ),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 512)),
            CODE.INVALID_ARGUMENT,
            "prompt",
            "CONTEXT_LENGTH_EXCEEDED",
        ),
        (ask("word " * 2000), CODE.INVALID_ARGUMENT, "prompt", "CONTEXT_LENGTH_EXCEEDED"),
        (ask("x" * (1 << 20)), CODE.INVALID_ARGUMENT, "prompt", "CONTEXT_LENGTH_EXCEEDED"),
        (ask(max_tokens=MAX_MODEL_LEN), CODE.INVALID_ARGUMENT, "prompt", "CONTEXT_LENGTH_EXCEEDED"),
        (ask(n=65), CODE.INVALID_ARGUMENT, "n", "INVALID_ARGUMENT"),
        (ask(temperature=-1), CODE.INVALID_ARGUMENT, "temperature", "INVALID_ARGUMENT"),
        (ask(stop=[""]), CODE.INVALID_ARGUMENT, "stop", "INVALID_ARGUMENT"),
        (ask(logprobs=21), CODE.INVALID_ARGUMENT, "logprobs", "INVALID_ARGUMENT"),
        (pb.GenerateRequest(text="a", model="other"), CODE.NOT_FOUND, "model", "MODEL_NOT_FOUND"),
        (pb.GenerateRequest(text="a", model="../etc"), CODE.NOT_FOUND, "model", "MODEL_NOT_FOUND"),
        (
            pb.GenerateRequest(text="a", request_id="a/b"),
            CODE.INVALID_ARGUMENT,
            "request_id",
            "INVALID_ARGUMENT",
        ),
        (
            pb.GenerateRequest(text="a", request_id="x" * 129),
            CODE.INVALID_ARGUMENT,
            "request_id",
            "INVALID_ARGUMENT",
        ),
        (
            pb.GenerateRequest(text="a", request_id="a\n"),
            CODE.INVALID_ARGUMENT,
            "request_id",
            "INVALID_ARGUMENT",
        ),
        (chat(), CODE.INVALID_ARGUMENT, "messages", "INVALID_ARGUMENT"),
        (chat("a\0"), CODE.INVALID_ARGUMENT, "messages", "INVALID_ARGUMENT"),
        (
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(content="a")])),
            CODE.INVALID_ARGUMENT,
            "messages",
            "INVALID_ARGUMENT",
        ),
        (
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="ghost")])),
            CODE.INVALID_ARGUMENT,
            "messages",
            "INVALID_ARGUMENT",
        ),
        (
            chat("a", "b", add_generation_prompt=True, continue_final_message=True),
            CODE.INVALID_ARGUMENT,
            "continue_final_message",
            "INVALID_ARGUMENT",
        ),
        (
            chat("a", template_kwargs={"chat_template": "{{ 1 }}"}),
            CODE.INVALID_ARGUMENT,
            "chat_template_kwargs",
            "INVALID_ARGUMENT",
        ),
    ],
)
async def test_bad_input_is_refused_by_name(
    rig: Rig, request_: pb.GenerateRequest, code: grpc.StatusCode, field: str, reason: str
) -> None:
    error = await rig.error(request_)
    assert (error.code, error.field, error.reason) == (code, field, reason)
    assert rig.engine.requests == []
    if reason == "CONTEXT_LENGTH_EXCEEDED":
        assert "this model's maximum context length is 512 tokens" in error.message


async def test_a_model_without_a_template_refuses_conversations(tmp_path: Path) -> None:
    text = load_text(write_folder(tmp_path, byte_level(), chat_template=None))
    async with serving(FakeEngine(), text) as rig:
        error = await rig.error(chat("hi"))
        assert (error.code, error.field) == (CODE.UNIMPLEMENTED, "messages")


async def test_a_template_gets_the_parts_of_a_message_where_it_reads_parts(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% for part in m.content %}({{ part.text }}){% endfor %}{% endfor %}"
    text = load_text(write_folder(tmp_path, byte_level(), chat_template=template))
    parts = [pb.ContentPart(text="Hi"), pb.ContentPart(text="hen")]
    messages = [pb.ChatMessage(role="user", parts=parts), pb.ChatMessage(role="user", content="ho")]
    async with serving(FakeEngine(generates([5])), text) as rig:
        request = pb.GenerateRequest(
            chat=pb.Chat(messages=messages), sampling=pb.SamplingParams(max_tokens=1)
        )
        first, *_ = await rig.generate(request)
        assert first.prompt.text == "(Hi)(hen)(ho)"
        messages[0].content = "both"
        request.chat.CopyFrom(pb.Chat(messages=messages))
        assert (await rig.error(request)).message == "messages: content and parts exclude each other"


# Models whose prompts an encoder reads.


async def test_what_a_decoder_answers_is_a_text_of_its_own(tmp_path: Path) -> None:
    text = load_text(write_folder(tmp_path, sentencepiece()))
    answer = generates(text.encode("upon a time", add_special_tokens=False))
    async with serving(FakeEngine(answer), text, encodes_prompts=True) as rig:
        responses = await rig.generate(ask("Once", max_tokens=3))
    assert text_of(responses) == text.decode(
        [token for response in responses for token in response.token_ids], skip_special_tokens=True
    )
    assert not text_of(responses).startswith(" ")
    assert last_of(responses).usage.prompt_tokens == len(text.encode("Once", add_special_tokens=True))


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (ask(prompt_logprobs=0), "prompt_logprobs"),
        (ask(prompt_logprobs=2, max_tokens=0), "prompt_logprobs"),
        (pb.GenerateRequest(text="a", echo=True), "echo"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])), "messages"),
    ],
)
async def test_nothing_is_served_that_takes_a_prompt_for_the_beginning_of_the_answer(
    text: Text, request_: pb.GenerateRequest, field: str
) -> None:
    async with serving(FakeEngine(), text, encodes_prompts=True) as rig:
        error = await rig.error(request_)
        assert (error.code, error.field) == (CODE.UNIMPLEMENTED, field)
        assert "an encoder reads this model's prompts" in error.message
        assert rig.engine.requests == []
        info = await rig.stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=60)
        assert info.encodes_prompts and not info.has_chat_template


async def test_what_a_decoder_begins_with_reaches_the_engine_and_takes_its_place_in_the_context(
    text: Text,
) -> None:
    request = ask("Once upon", max_tokens=2)
    request.decoder_prompt.extend([7, 8])
    prompt = text.encode("Once upon", add_special_tokens=True)
    async with serving(FakeEngine(generates((5, 6, 7))), text, encodes_prompts=True) as rig:
        responses = await rig.generate(request)
        assert rig.engine.requests[0].decoder_prompt == (7, 8)
        assert rig.engine.requests[0].prompt == prompt
        assert [token for response in responses for token in response.token_ids] == [5, 6]
        request.sampling.max_tokens = MAX_MODEL_LEN - 1 - len(prompt)
        assert (await rig.error(request)).reason == "CONTEXT_LENGTH_EXCEEDED"
        request.decoder_prompt.append(VOCAB_SIZE)
        error = await rig.error(request)
        assert (error.code, error.field) == (CODE.INVALID_ARGUMENT, "decoder_prompt")


async def test_without_an_encoder_there_is_nothing_for_a_decoder_to_begin_with(rig: Rig) -> None:
    request = ask()
    request.decoder_prompt.append(7)
    error = await rig.error(request)
    assert (error.code, error.field) == (CODE.UNIMPLEMENTED, "decoder_prompt")


# The other methods.


async def test_a_text_or_a_conversation_is_tokenized_as_its_prompt_would_be(rig: Rig) -> None:
    reply = await rig.stub.Tokenize(pb.TokenizeRequest(text="Once upon", return_tokens=True), timeout=60)
    assert tuple(reply.token_ids) == (1, *rig.ids("Once upon"))
    assert list(reply.tokens) == [rig.text.token(token_id) for token_id in reply.token_ids]
    assert reply.max_model_len == MAX_MODEL_LEN
    reply = await rig.stub.Tokenize(pb.TokenizeRequest(text="", add_special_tokens=False), timeout=60)
    assert list(reply.token_ids) == []
    reply = await rig.stub.Tokenize(pb.TokenizeRequest(text="Once upon"), timeout=60)
    assert list(reply.tokens) == [], "nobody asked for them"
    reply = await rig.stub.Tokenize(pb.TokenizeRequest(chat=chat("Hi").chat, return_tokens=True), timeout=60)
    assert list(reply.tokens)[:2] == ["<s>", "["]
    long = await rig.stub.Tokenize(pb.TokenizeRequest(text="hen " * 20_000), timeout=60)
    assert len(long.token_ids) > MAX_MODEL_LEN


async def test_a_large_text_is_tokenized_while_others_are_answered(rig: Rig) -> None:
    """The tokenizer lets go of the interpreter: calls that come meanwhile are answered before it is done."""
    large = rig.stub.Tokenize(pb.TokenizeRequest(text="Once upon a time. " * 100_000), timeout=120)
    done = asyncio.ensure_future(large.code())
    num_answered = 0
    while not done.done():
        await rig.stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=120)
        num_answered += 1
    assert await done is CODE.OK
    assert num_answered > 3


async def test_an_answer_that_no_message_can_hold_is_refused_for_good(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "PUBLIC_MESSAGE_BYTES", 100)
    for request in (
        pb.TokenizeRequest(text="hen " * 200),
        pb.TokenizeRequest(text="hen " * 20, return_tokens=True),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.Tokenize(request, timeout=60)
        error = from_rpc_error(caught.value)
        assert (error.code, error.field, error.reason) == (CODE.INVALID_ARGUMENT, "prompt", "TOO_LARGE")
        assert error.retry_after_s is None


async def test_token_ids_are_detokenized_with_their_special_tokens(rig: Rig) -> None:
    ids = (1, *rig.ids("naïve 😀"), 2)
    reply = await rig.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids), timeout=60)
    assert reply.text == "<s>naïve 😀</s>"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.stub.Detokenize(pb.DetokenizeRequest(token_ids=[VOCAB_SIZE]), timeout=60)
    assert from_rpc_error(caught.value).field == "tokens"


async def test_tokenizing_needs_a_tokenizer_and_the_right_model(no_text: Text) -> None:
    async with serving(FakeEngine(), no_text) as rig:
        for call in (
            rig.stub.Tokenize(pb.TokenizeRequest(text="a"), timeout=60),
            rig.stub.Detokenize(pb.DetokenizeRequest(token_ids=[1]), timeout=60),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() == CODE.UNIMPLEMENTED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.Tokenize(pb.TokenizeRequest(text="a", model="b"), timeout=60)
        assert caught.value.code() == CODE.NOT_FOUND


async def test_the_model_describes_itself(rig: Rig) -> None:
    info = await rig.stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=60)
    assert info == pb.GetModelInfoResponse(
        model="tiny",
        version=__version__,
        family="mixtral",
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
        num_layers=2,
        num_experts=8,
        num_experts_per_token=2,
        epoch=EPOCH,
        has_tokenizer=True,
        has_chat_template=True,
        eos_token_ids=[2],
        created=1_700_000_000,
        control_address="control:1",
        sampling_defaults=neutral_sampling(),
    )
    assert (await rig.stub.GetRouterStats(pb.GetRouterStatsRequest(), timeout=60)).steps == 7


# What others see of a request.


async def test_a_request_span_counts_tokens_and_reaches_the_engine(
    rig: Rig, spans: InMemorySpanExporter
) -> None:
    request = ask(n=2, max_tokens=3)
    request.request_id = "r1"
    await rig.generate(request)
    (span,) = spans.get_finished_spans()
    assert dict(span.attributes or {}) == {
        telemetry.REQUEST_ID: "r1",
        telemetry.MODEL: "tiny",
        telemetry.EPOCH: EPOCH,
        telemetry.INPUT_TOKENS: 1 + len(rig.ids("Once upon")),
        telemetry.OUTPUT_TOKENS: 6,
    }
    for sequence in rig.engine.requests:
        assert sequence.trace is not None
        assert trace.get_current_span(sequence.trace).get_span_context() == span.get_span_context()


async def test_logs_and_spans_hold_no_content(
    rig: Rig, spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "xyzzy-marker"
    with caplog.at_level(logging.DEBUG):
        await rig.generate(ask(secret, max_tokens=3, stop=[secret]))
        await rig.error(ask(secret, temperature=-1))
        await rig.error(chat(secret, template_kwargs={"tokenize": secret}))
        await rig.error(
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role=secret, content=secret)]))
        )
    logs = [r for r in caplog.records if r.name.startswith(("router", "moesaic"))]
    seen = [f"{record.getMessage()} {getattr(record, 'fields', '')}" for record in logs]
    seen += [str(span.to_json()) for span in spans.get_finished_spans()]
    assert sum("request ended" in line for line in seen) == 1
    assert not any(secret in line or str(list(rig.ids(secret)))[1:-1] in line for line in seen)
