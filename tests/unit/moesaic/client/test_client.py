"""The client against a fake router on a real socket."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
from support.fake_router import EOS, FakeRouter, RunningRouter, encode, logprob_at, running

from moesaic import Allow, Client, Deny, ExpertPolicy, Require, SyncClient, Token, errors, rpc
from moesaic.client.call_failure import explain
from moesaic.client.completion import WeightVersion
from moesaic.v1 import inference_pb2 as pb


@pytest.fixture
async def router() -> AsyncIterator[RunningRouter]:
    async with running(FakeRouter()) as it:
        yield it


@pytest.fixture
async def client(router: RunningRouter) -> AsyncIterator[Client]:
    async with Client(router.address, timeout_s=60) as it:
        yield it


async def test_tokens_come_one_by_one_and_spell_their_text(client: Client) -> None:
    tokens = [token async for token in client.generate("abc", max_tokens=5)]
    assert [str(token) for token in tokens] == ["a", "b", "c", "a", "b"]
    assert [token.token_ids for token in tokens] == [(97,), (98,), (99,), (97,), (98,)]
    assert [token.finish_reason for token in tokens] == [None] * 4 + ["length"]
    assert tokens[0].prompt is not None and tokens[0].prompt.token_ids == (97, 98, 99)
    assert tokens[-1].usage is not None and tokens[-1].usage.completion_tokens == 5
    assert {token.epoch for token in tokens} == {"e1"}


async def test_a_client_works_without_being_entered_or_closed(router: RunningRouter) -> None:
    assert (
        "".join([str(token) async for token in Client(router.address).generate("xy", max_tokens=3)]) == "xyx"
    )


async def test_complete_collects_text_usage_timing_and_prompt(client: Client) -> None:
    completion = await client.complete("hé", max_tokens=4, logprobs=1, prompt_logprobs=2)
    assert (str(completion), completion.token_ids) == ("héh", (104, 195, 169, 104))
    assert (completion.finish_reason, completion.model, completion.epoch) == ("length", "fake", "e1")
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 4)
    assert completion.timing.total_s == pytest.approx(0.03)
    assert completion.prompt.text == "hé"
    assert [entry.logprob for entry in completion.prompt.logprobs] == [None, logprob_at(1), logprob_at(2)]
    assert [entry.logprob for entry in completion.logprobs] == [logprob_at(p) for p in range(3, 7)]
    assert completion.prompt.logprobs[1].top[0].logprob > logprob_at(1)


async def test_a_prompt_may_be_text_token_ids_or_messages(client: Client, router: RunningRouter) -> None:
    await client.complete("ab", max_tokens=1)
    await client.complete([97, 98], max_tokens=1)
    await client.complete(
        ({"role": "user", "content": "ab"},), max_tokens=1, template_kwargs={"deep": [1, {"x": None}]}
    )
    text, ids, chat = router.router.requests
    assert (text.text, list(ids.token_ids.ids)) == ("ab", [97, 98])
    assert (chat.chat.messages[0].role, chat.chat.messages[0].content) == ("user", "ab")
    assert MessageToDict(chat.chat.template_kwargs) == {"deep": [1.0, {"x": None}]}


async def test_a_message_may_have_its_content_in_parts(client: Client, router: RunningRouter) -> None:
    part = {"type": "text", "text": "ab"}
    await client.complete([{"role": "user", "content": [part, part]}], max_tokens=1)
    (request,) = router.router.requests
    assert [part.text for part in request.chat.messages[0].parts] == ["ab", "ab"]
    for wrong in ([{"type": "image_url"}], ["ab"], 5, [{"type": "text", "text": 5}]):
        with pytest.raises(errors.InvalidArgument, match="text parts"):
            await client.complete([{"role": "user", "content": wrong}], max_tokens=1)


async def test_options_arrive_and_absent_ones_stay_absent(client: Client, router: RunningRouter) -> None:
    await client.complete(
        "ab",
        max_tokens=3,
        temperature=0,
        top_k=4,
        stop="zz",
        logit_bias={97: -1.5},
        seed=None,
        model="fake",
        add_special_tokens=False,
        tenant="blue",
        request_id="mine-1",
    )
    (request,) = router.router.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, list(sampling.stop)) == (0, 4, ["zz"])
    assert (
        sampling.HasField("temperature") and not sampling.HasField("seed") and not sampling.HasField("top_p")
    )
    assert dict(sampling.logit_bias) == {97: -1.5}
    assert request.HasField("add_special_tokens") and not request.add_special_tokens
    assert request.tenant == "blue"
    assert router.router.metadata[0]["x-request-id"] == "mine-1" == request.request_id


async def test_a_policy_reaches_the_router_and_comes_back_with_the_answer(
    client: Client, router: RunningRouter
) -> None:
    policy = Deny("maths-v1", "0:7") | Require("law")
    completion = await client.complete(
        "abc", max_tokens=3, experts=policy, epoch="e1", session="s1", return_weight_versions=True
    )
    (request,) = router.router.requests
    assert request.experts == pb.ExpertPolicy(deny=["maths-v1", "0:7"], require=["law"])
    assert (request.epoch, request.session_id, request.return_weight_versions) == ("e1", "s1", True)
    assert (completion.epoch, completion.experts) == ("e1", policy)
    assert completion.weight_versions == (WeightVersion("e1", 0, 3),)
    hash(completion)


async def test_a_request_that_restricts_nothing_has_no_policy(client: Client, router: RunningRouter) -> None:
    completion = await client.complete("abc", max_tokens=1, experts=ExpertPolicy())
    assert not router.router.requests[0].HasField("experts")
    assert (completion.experts, completion.weight_versions) == (None, ())


async def test_continuations_are_told_apart_by_index(client: Client) -> None:
    texts = ["", "", ""]
    async for token in client.generate("abc", n=3, max_tokens=4):
        texts[token.index] += str(token)
    assert texts == ["abca", "bcab", "cabc"]


async def test_a_stop_string_ends_the_text_before_it(client: Client) -> None:
    completion = await client.complete("abcd", max_tokens=20, stop=["dab", "x"])
    assert (completion.text, completion.finish_reason, completion.stop) == ("abc", "stop", "dab")


async def test_an_end_of_sequence_token_ends_it(client: Client, router: RunningRouter) -> None:
    router.router.eos_after = 2
    completion = await client.complete("abc", max_tokens=9)
    assert (completion.token_ids, completion.finish_reason) == ((97, 98, EOS), "stop")


@pytest.mark.parametrize(
    ("options", "error", "field"),
    [
        ({"model": "other"}, errors.NotFound, "model"),
        ({"temperature": -1}, errors.InvalidArgument, "temperature"),
        ({"max_tokens": 4000}, errors.InvalidArgument, "prompt"),
        ({"top_k": -3}, errors.InvalidArgument, "top_k"),
        ({"seed": "one"}, errors.InvalidArgument, "seed"),
        ({"stop_token_ids": ["a"]}, errors.InvalidArgument, "stop_token_ids"),
        ({"n": -1}, errors.InvalidArgument, "n"),
        ({"experts": ["maths-v1"]}, errors.InvalidArgument, "experts"),
        ({"epoch": 7}, errors.InvalidArgument, "epoch"),
        ({"session": 7}, errors.InvalidArgument, "session"),
    ],
)
async def test_a_bad_option_is_an_error_that_names_it(
    client: Client, options: dict[str, object], error: type[errors.MoesaicError], field: str
) -> None:
    with pytest.raises(error) as caught:
        [token async for token in client.generate("abc", **options)]  # type: ignore[arg-type]
    assert caught.value.field == field


async def test_an_unknown_option_is_a_type_error_as_in_any_function(client: Client) -> None:
    with pytest.raises(TypeError, match="'topk'"):
        await client.complete("abc", topk=3)  # type: ignore[call-arg]


async def test_one_continuation_is_not_asked_for_several(client: Client, router: RunningRouter) -> None:
    with pytest.raises(errors.InvalidArgument, match="use generate") as caught:
        await client.complete("abc", n=2)  # type: ignore[call-arg]
    assert caught.value.field == "n"
    assert not router.router.requests


@pytest.mark.parametrize("prompt", ["", [], [300], [-1], [{"role": "user", "colour": "red"}], [1.5]])
async def test_a_bad_prompt_is_invalid_and_names_the_prompt(client: Client, prompt: object) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        await client.complete(prompt, max_tokens=1)  # type: ignore[arg-type]
    assert caught.value.field == "prompt"


async def test_an_error_in_mid_stream_keeps_its_class_and_details(
    client: Client, router: RunningRouter
) -> None:
    router.router.error = errors.Unavailable("no replica left", reason="NO_REPLICA", retry_after_s=2.0)
    router.router.error_after = 2
    seen: list[Token] = []
    with pytest.raises(errors.Unavailable) as caught:
        async for token in client.generate("abc", max_tokens=5):
            seen.append(token)
    assert len(seen) == 2
    assert (caught.value.reason, caught.value.retry_after_s) == ("NO_REPLICA", 2.0)


async def test_a_deadline_ends_a_silent_stream(client: Client, router: RunningRouter) -> None:
    router.router.silent_after = 1
    with pytest.raises(errors.DeadlineExceeded):
        await client.complete("abc", max_tokens=5, timeout_s=0.2)


@pytest.mark.parametrize(
    ("error", "begun", "failure", "message"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, False, errors.DeadlineExceeded, "no answer within 0.3 s"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, True, errors.DeadlineExceeded, "no complete answer within 0.3 s"),
        (grpc.StatusCode.UNAVAILABLE, False, errors.Unavailable, "no router answers at somewhere:50051"),
        (
            grpc.StatusCode.UNAVAILABLE,
            True,
            errors.Unavailable,
            "the connection to the router at somewhere:50051 broke in mid-answer",
        ),
        (grpc.StatusCode.CANCELLED, True, errors.Cancelled, "the client was closed during the call"),
    ],
)
def test_a_failure_without_a_word_of_the_router_is_a_sentence(
    error: grpc.StatusCode, begun: bool, failure: type[errors.MoesaicError], message: str
) -> None:
    rpc_error = grpc.aio.AioRpcError(
        error, grpc.aio.Metadata(), grpc.aio.Metadata(), "Stream removed (IOCP/Socket)"
    )

    explained = explain(rpc_error, "somewhere:50051", timeout_s=0.3, begun=begun)

    assert (type(explained), explained.message) == (failure, message)


async def test_nobody_at_the_address_is_unavailable() -> None:
    async with running(FakeRouter()) as gone:
        address = gone.address
    async with Client(address) as client:
        with pytest.raises(errors.Unavailable, match=f"^no router answers at {address}$"):
            await client.complete("abc", timeout_s=60)
        with pytest.raises(errors.Unavailable, match=f"^no router answers at {address}$"):
            await client.model_info()


async def test_an_http_port_is_recognised() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server, Client(f"{host}:{port}") as client:
        with pytest.raises(errors.FailedPrecondition, match=f"^{host}:{port} is an HTTP port: ") as caught:
            await client.complete("abc", timeout_s=60)
    assert caught.value.reason == "NOT_A_ROUTER"


async def test_a_grpc_service_that_is_no_router_is_recognised() -> None:
    server = rpc.Server({})
    port = await server.start("127.0.0.1", 0)
    try:
        async with Client(f"127.0.0.1:{port}") as client:
            with pytest.raises(errors.FailedPrecondition, match="another gRPC service, not a router"):
                await client.complete("abc", timeout_s=60)
    finally:
        await server.stop(0)


@pytest.mark.parametrize("make", [Client, SyncClient])
def test_an_address_that_is_none_is_refused_at_once(make: type[Client | SyncClient]) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"^127\.0\.0\.1 has no port"):
        make("127.0.0.1")


@dataclass
class BusyAtFirst(FakeRouter):
    """Refuses its first calls, as a router does that is full or still loading."""

    refusals: int = 2
    retry_after_s: float = 0.01

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        if len(self.requests) < self.refusals:
            self.requests.append(request)
            # The prompt is sent ahead, and an expert worker is missing for the first token.
            yield pb.GenerateResponse(prompt=pb.PromptInfo(token_ids=[97]))
            raise errors.Overloaded("the queue is full", retry_after_s=self.retry_after_s)
        async for response in super().Generate(request, context):
            yield response

    async def GetModelInfo(self, request: object, context: object) -> pb.GetModelInfoResponse:
        if self.refusals:
            self.refusals -= 1
            raise errors.Unavailable("the router is loading", retry_after_s=self.retry_after_s)
        return await super().GetModelInfo(request, context)


async def test_a_call_that_is_refused_for_the_moment_is_repeated() -> None:
    async with running(BusyAtFirst()) as router, Client(router.address) as client:
        tokens = [token async for token in client.generate("ab", max_tokens=3)]
        info = await client.model_info()

    assert ["".join(map(str, tokens)), len(tokens), info.model] == ["aba", 3, "fake"]
    assert (info.sampling_defaults.temperature, info.sampling_defaults.top_k) == (pytest.approx(0.7), 0)
    assert len(router.router.requests) == 3


async def test_the_sync_client_repeats_such_a_call_too() -> None:
    def work(address: str) -> list[str]:
        with SyncClient(address) as client:
            return [client.complete("ab", max_tokens=3).text, client.model_info().model]

    async with running(BusyAtFirst()) as router:
        assert await asyncio.to_thread(work, router.address) == ["aba", "fake"]


async def test_retries_can_be_switched_off() -> None:
    async with running(BusyAtFirst()) as router, Client(router.address, retries=False) as client:
        with pytest.raises(errors.Overloaded, match="the queue is full"):
            await client.complete("ab")
        with pytest.raises(errors.Unavailable, match="the router is loading"):
            await client.model_info()

    assert len(router.router.requests) == 1


async def test_a_retry_that_the_deadline_forbids_is_not_awaited() -> None:
    router = BusyAtFirst(retry_after_s=3600.0)
    async with running(router) as link, Client(link.address) as client:
        with pytest.raises(errors.Overloaded, match="the queue is full"):
            await client.complete("ab", timeout_s=60)

    assert len(router.requests) == 1


async def test_no_call_is_repeated_once_a_token_has_come(client: Client, router: RunningRouter) -> None:
    router.router.error = errors.Unavailable("no replica left", retry_after_s=0.01)
    router.router.error_after = 1
    with pytest.raises(errors.Unavailable):
        await client.complete("ab", max_tokens=3)

    assert len(router.router.requests) == 1


def collected(client: SyncClient, **options: Any) -> list[Token]:
    return list(client.generate("abcd", max_tokens=6, **options))


async def gathered(client: Client, **options: Any) -> list[Token]:
    return [token async for token in client.generate("abcd", max_tokens=6, **options)]


@pytest.mark.parametrize("blocking", [False, True])
async def test_an_answer_whose_router_dies_goes_on_at_the_next_address(blocking: bool) -> None:
    first, second = FakeRouter(silent_after=2), FakeRouter()
    options = {"n": 2, "logprobs": 1, "stop": "dab"}
    async with running(first) as dying, running(second) as other:
        addresses = f"{dying.address},{other.address}"
        async with Client(other.address) as client:
            undisturbed = await gathered(client, **options)
        second.requests.clear()
        if blocking:
            with SyncClient(addresses, timeout_s=20) as sync_client:
                answer = asyncio.create_task(asyncio.to_thread(collected, sync_client, **options))
                await until(lambda: first.num_sent == 4)
                await dying.kill()
                tokens = await answer
        else:
            async with Client(addresses, timeout_s=20) as client:
                answer = asyncio.create_task(gathered(client, **options))
                await until(lambda: first.num_sent == 4)
                await dying.kill()
                tokens = await answer
                assert (await client.complete("xy", max_tokens=2)).text == "xy"  # at the living one, at once
    assert tokens == undisturbed
    assert len(first.requests) == 1
    resume = second.requests[0].resume
    assert [len(it.token_ids) for it in resume.continuations] == [2, 2]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)  # what was sent arrives


async def test_an_answer_waits_for_its_only_router_to_come_back() -> None:
    async with running(FakeRouter(silent_after=2)) as dying, Client(dying.address, timeout_s=20) as client:
        answer = asyncio.create_task(gathered(client))
        await until(lambda: dying.router.num_sent == 2)
        await dying.kill()
        async with running(FakeRouter(), port=int(dying.address.rpartition(":")[2])):
            assert "".join(map(str, await answer)) == "abcdab"


async def test_without_retries_an_answer_ends_with_its_router() -> None:
    async with (
        running(FakeRouter(silent_after=2)) as dying,
        running(FakeRouter()) as other,
        Client([dying.address, other.address], retries=False) as client,
    ):
        answer = asyncio.create_task(gathered(client))
        await until(lambda: dying.router.num_sent == 2)
        await dying.kill()
        with pytest.raises(errors.Unavailable, match="broke in mid-answer"):
            await answer
    assert not other.router.requests


async def test_an_address_where_nobody_is_leads_to_the_next_one() -> None:
    async with running(FakeRouter()) as gone:
        nobody = gone.address
    async with running(FakeRouter()) as router, Client([nobody, router.address]) as client:
        assert (await client.model_info()).model == "fake"
    async with running(FakeRouter()) as router, Client([nobody, router.address]) as client:
        assert (await client.complete("ab", max_tokens=2)).text == "ab"


async def test_leaving_the_loop_cancels_the_call(client: Client, router: RunningRouter) -> None:
    router.router.silent_after = 2
    async with aclosing(client.generate("abc", max_tokens=5)) as tokens:
        async for _ in tokens:
            break
    await asyncio.wait_for(router.router.cancelled.wait(), 60)


async def test_cancelling_the_task_cancels_the_call(client: Client, router: RunningRouter) -> None:
    router.router.silent_after = 0
    task = asyncio.create_task(client.complete("abc"))
    while not router.router.num_running:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(router.router.cancelled.wait(), 60)


async def test_closing_the_client_ends_its_calls_with_an_error_of_ours(router: RunningRouter) -> None:
    router.router.silent_after = 0
    client = Client(router.address)
    task = asyncio.create_task(client.complete("abc"))
    while not router.router.num_running:
        await asyncio.sleep(0.01)
    await client.close()
    with pytest.raises(errors.Cancelled):
        await task
    with pytest.raises(errors.FailedPrecondition):
        await client.complete("abc")


async def test_the_current_trace_goes_along(client: Client, router: RunningRouter) -> None:
    context = SpanContext(0xABCDEF, 0x123, is_remote=False, trace_flags=TraceFlags(1))
    with trace.use_span(NonRecordingSpan(context)):
        await client.complete("abc", max_tokens=1)
    assert re.fullmatch(r"00-0{26}abcdef-0{13}123-01", router.router.metadata[0]["traceparent"])


async def test_tokenize_detokenize_and_the_state_of_the_router(client: Client) -> None:
    assert list((await client.tokenize("ab")).token_ids) == [97, 98]
    assert (await client.tokenize("ab")).tokens == ("<97>", "<98>")
    assert list((await client.tokenize([{"role": "u", "content": "x"}])).token_ids) == encode("<u:x>")
    assert await client.detokenize([97, 98]) == "ab"
    assert (await client.model_info()).max_model_len == 128
    assert (await client.router_stats()).generated_tokens == 7
    with pytest.raises(errors.InvalidArgument):
        await client.detokenize([999])


async def test_one_client_serves_many_streams_at_once(client: Client) -> None:
    prompts = [f"prompt {i} " for i in range(30)]
    completions = await asyncio.gather(*(client.complete(prompt, max_tokens=20) for prompt in prompts))
    assert [it.text for it in completions] == [(prompt * 3)[:20] for prompt in prompts]


async def test_a_client_can_be_used_in_one_event_loop_after_another(router: RunningRouter) -> None:
    client = Client(router.address)
    for _ in range(2):
        text = await asyncio.to_thread(lambda: asyncio.run(client.complete("ab", max_tokens=2)).text)
        assert text == "ab"


async def test_the_sync_client_does_the_same_without_asyncio(router: RunningRouter) -> None:
    def work() -> tuple[list[str], str, str]:
        with SyncClient(router.address) as client:
            tokens = [str(token) for token in client.generate("abc", max_tokens=2)]
            return tokens, client.complete([97], max_tokens=1).text, client.detokenize([98])

    assert await asyncio.to_thread(work) == (["a", "b"], "a", "b")


async def test_the_sync_client_takes_a_policy_too(router: RunningRouter) -> None:
    def work() -> list[Token]:
        with SyncClient(router.address) as client:
            options = {"experts": Allow("law"), "session": "s1", "return_weight_versions": True}
            return list(client.generate("abc", n=2, max_tokens=2, **options))

    tokens = await asyncio.to_thread(work)
    ends = [token for token in tokens if token.finish_reason]
    assert tokens[0].experts == Allow("law")
    assert [token.weight_versions for token in ends] == [(WeightVersion("e1", 0, 2),)] * 2
    assert router.router.requests[0].session_id == "s1"


async def test_the_sync_client_cancels_a_stream_that_is_left(router: RunningRouter) -> None:
    router.router.silent_after = 1

    def work() -> None:
        with SyncClient(router.address) as client:
            for _ in client.generate("abc"):
                break
            with pytest.raises(errors.DeadlineExceeded):
                client.complete("abc", timeout_s=0.2)

    await asyncio.to_thread(work)
    await asyncio.wait_for(router.router.cancelled.wait(), 60)


async def test_closing_the_sync_client_ends_its_calls_with_an_error_of_ours(router: RunningRouter) -> None:
    router.router.silent_after = 0
    client = SyncClient(router.address)
    call = asyncio.create_task(asyncio.to_thread(client.complete, "abc"))
    while not router.router.num_running:
        await asyncio.sleep(0.01)
    client.close()
    client.close()
    with pytest.raises(errors.Cancelled):
        await call
    with pytest.raises(errors.FailedPrecondition):
        client.complete("abc")


async def run_program(program: str, address: str) -> tuple[str, str, int]:
    """Runs a program whose only argument is the address of a router; returns its output, errors and status."""
    result = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", program, address],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return result.stdout, result.stderr, result.returncode


async def test_a_program_that_never_closes_its_sync_client_still_ends(router: RunningRouter) -> None:
    program = """
import sys
from moesaic import SyncClient
print(SyncClient(sys.argv[1]).complete("ab", max_tokens=2))
"""
    assert await run_program(program, router.address) == ("ab\n", "", 0)


async def test_a_program_may_use_asyncio_after_it_has_closed_a_sync_client(router: RunningRouter) -> None:
    program = """
import asyncio, sys
from moesaic import Client, SyncClient

async def ask():
    async with Client(sys.argv[1]) as client:
        print(await client.complete("ab", max_tokens=2))

for _ in range(5):
    with SyncClient(sys.argv[1]) as client:
        print(client.complete("ab", max_tokens=2))
    asyncio.run(ask())
"""
    assert await run_program(program, router.address) == ("ab\n" * 10, "", 0)


async def test_processes_forked_before_the_first_client_may_each_have_one(router: RunningRouter) -> None:
    # After it gRPC itself is not safe: one fork in twenty never returns (https://github.com/grpc/grpc/issues/43055).
    program = """
import os, sys
from moesaic import SyncClient

def ask():
    with SyncClient(sys.argv[1]) as client:
        print(client.complete("ab", max_tokens=2, timeout_s=60), flush=True)

if os.fork() == 0:
    ask()
    os._exit(0)
os.wait()
ask()
"""
    assert await run_program(program, router.address) == ("ab\n" * 2, "", 0)


async def test_a_sync_client_works_inside_a_running_event_loop_as_in_a_notebook(
    router: RunningRouter,
) -> None:
    program = """
import asyncio, sys
from moesaic import SyncClient

async def cell():
    with SyncClient(sys.argv[1]) as client:
        print("".join(str(token) for token in client.generate("ab", max_tokens=2)))

asyncio.run(cell())
"""
    assert await run_program(program, router.address) == ("ab\n", "", 0)
