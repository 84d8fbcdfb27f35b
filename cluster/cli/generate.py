"""`moesaic generate`: streams a continuation of a prompt to the terminal."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TextIO, Unpack

from rich.console import Console

from cluster.cli.router_client import router_client
from moesaic import Client, Completion, Token
from moesaic.client.generate_request import GenerateOptions
from moesaic.errors import InvalidArgument
from moesaic.exit_codes import Spell


def spelled(spell: Spell | None) -> Spell:
    """The same for the fields of a policy, too: `experts.deny[2]` comes from `--deny`."""
    return lambda field: None if spell is None else spell(_parameter(field))


def _parameter(field: str) -> str:
    name = field.removeprefix("experts.").partition("[")[0]
    return "top_experts" if field == "experts.top_k" else name


def read_prompt(prompt: str | None, stdin: TextIO) -> str:
    """The prompt, or what is piped into standard input without the end of its last line."""
    if prompt is None and stdin.isatty():
        raise InvalidArgument("prompt: is missing: give it, or pipe it in", field="prompt")
    if prompt is not None and prompt != "-":
        return prompt
    try:
        return stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise InvalidArgument("prompt: standard input is not UTF-8", field="prompt") from error


async def run_generate(
    target: str, prompt: str, *, as_json: bool, **options: Unpack[GenerateOptions]
) -> None:
    """Prints the answer token by token, or at its end as one JSON object. Raises MoesaicError."""
    async with router_client(target) as client:
        if as_json:
            print(json.dumps(_plain(await client.complete(prompt, **options))))
            return
        last = await stream_answer(client, prompt, **options)
    if last is not None:
        Console(stderr=True, highlight=False).print(summarise(last, options), style="dim", markup=False)


async def stream_answer(client: Client, prompt: str, **options: Unpack[GenerateOptions]) -> Token | None:
    """Writes each piece of the answer as it arrives, and a line end after the last; returns the last one.

    An answer that breaks off gets its line end, too.
    """
    last = None
    try:
        async for last in client.generate(prompt, **options):
            sys.stdout.write(last.text)
            sys.stdout.flush()
    finally:
        if last is not None:
            sys.stdout.write("\n")
            sys.stdout.flush()
    return last


def summarise(last: Token, options: GenerateOptions) -> str:
    """How long an answer is, how fast it came, and why it ended."""
    assert last.usage is not None and last.timing is not None
    count = last.usage.completion_tokens
    parts = ["1 token" if count == 1 else f"{count:,} tokens"]
    following_s = last.timing.total_s - last.timing.first_token_s
    if count > 1 and following_s > 0:
        parts.append(f"{(count - 1) / following_s:,.0f} a second")
    parts.append(f"first after {1000 * last.timing.first_token_s:,.0f} ms")
    return f"{', '.join(parts)}; {_end(last, options.get('max_tokens'))}"


def _end(last: Token, max_tokens: int | None) -> str:
    assert last.usage is not None
    if last.finish_reason == "length":
        reached = max_tokens is not None and last.usage.completion_tokens >= max_tokens
        return "ended by --max-tokens" if reached else "ended by the model's context"
    return "ended by --stop" if last.stop else "ended by the model"


def _plain(completion: Completion) -> dict[str, object]:
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop": completion.stop,
        "usage": asdict(completion.usage),
        "timing": asdict(completion.timing),
        "model": completion.model,
        "epoch": completion.epoch,
        "experts": asdict(completion.experts) if completion.experts else None,
        "request_id": completion.request_id,
    }
