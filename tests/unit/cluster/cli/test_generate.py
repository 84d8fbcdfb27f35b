"""`moesaic generate`: where its prompt comes from, and what it says after the answer."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from support.fake_router import FakeRouter, running

from cluster.cli.generate import read_prompt, run_generate, spelled, summarise
from moesaic import Client, Token
from moesaic.errors import InvalidArgument, Unavailable


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def piped(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content))


def test_a_prompt_that_is_given_is_taken_and_nothing_is_read() -> None:
    assert read_prompt("Hello", piped(b"other")) == "Hello"


@pytest.mark.parametrize("prompt", ["-", None])
@pytest.mark.parametrize("written", [b"Hello\nyou", b"Hello\nyou\n", b"Hello\nyou\r\n"])
def test_a_prompt_is_read_from_standard_input_without_its_last_line_end(
    prompt: str | None, written: bytes
) -> None:
    assert read_prompt(prompt, piped(written)) == "Hello\nyou"


def test_without_a_prompt_nobody_waits_for_one_at_a_terminal() -> None:
    with pytest.raises(InvalidArgument) as refused:
        read_prompt(None, Terminal(io.BytesIO()))
    assert refused.value.field == "prompt"


def test_a_prompt_of_other_bytes_than_utf_8_is_told() -> None:
    with pytest.raises(InvalidArgument) as refused:
        read_prompt("-", piped(b"\xff"))
    assert refused.value.field == "prompt"


async def last_token(max_tokens: int) -> Token:
    async with running(FakeRouter()) as link, Client(link.address) as client:
        return [token async for token in client.generate("ab", max_tokens=max_tokens)][-1]


async def test_after_an_answer_its_length_and_speed_and_end_are_told() -> None:
    last = await last_token(4)
    assert last.usage is not None and last.timing is not None
    timing = replace(last.timing, first_token_s=0.0172, total_s=2.0992)
    last = replace(
        last, finish_reason="length", usage=replace(last.usage, completion_tokens=128), timing=timing
    )
    told = "128 tokens, 61 a second, first after 17 ms; ended by "
    assert summarise(last, {"max_tokens": 128}) == f"{told}--max-tokens"
    assert summarise(last, {"max_tokens": 500}) == f"{told}the model's context"
    assert summarise(replace(last, finish_reason="stop", stop=None), {}) == f"{told}the model"
    assert summarise(replace(last, finish_reason="stop", stop="."), {}) == f"{told}--stop"
    alone = replace(last, usage=replace(last.usage, completion_tokens=1))
    assert summarise(alone, {"max_tokens": 1}) == "1 token, first after 17 ms; ended by --max-tokens"


@pytest.mark.parametrize(
    ("field", "flag"),
    [
        ("experts.deny[2]", "deny"),
        ("experts.allow", "allow"),
        ("experts.top_k", "top_experts"),
        ("experts.on_missing", "on_missing"),
        ("top_k", "top_k"),
    ],
)
def test_an_error_about_a_policy_is_spelled_as_the_flag_that_made_it(field: str, flag: str) -> None:
    assert spelled(lambda name: f"--{name}")(field) == f"--{flag}"
    assert spelled(None)(field) is None


async def test_the_answer_alone_is_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    async with running(FakeRouter()) as link:
        await run_generate(link.address, "ab", as_json=False, max_tokens=4)
    written = capsys.readouterr()
    assert written.out.endswith("\n") and "tokens" not in written.out
    assert written.err.startswith("4 tokens, ") and written.err.endswith("ended by --max-tokens\n")


async def test_an_answer_that_breaks_off_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    async with running(FakeRouter(error=Unavailable("the worker died"), error_after=2)) as link:
        with pytest.raises(Unavailable):
            await run_generate(link.address, "ab", as_json=False, max_tokens=50)
    written = capsys.readouterr()
    assert written.out.strip() and written.out.endswith("\n")
    assert written.err == ""
