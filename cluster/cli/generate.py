"""`moesaic generate`: streams a continuation of a prompt to the terminal."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Unpack

from cluster.cli.router_client import router_client
from moesaic import Client, Completion
from moesaic.generate_request import GenerateOptions


async def run_generate(
    target: str, prompt: str, *, as_json: bool, **options: Unpack[GenerateOptions]
) -> None:
    """Prints the answer token by token, or at its end as one JSON object. Raises MoesaicError."""
    async with router_client(target) as client:
        if as_json:
            print(json.dumps(_plain(await client.complete(prompt, **options))))
            return
        await stream_answer(client, prompt, **options)


async def stream_answer(client: Client, prompt: str, **options: Unpack[GenerateOptions]) -> None:
    """Writes each piece of the answer as it arrives, and a line end after the last."""
    async for token in client.generate(prompt, **options):
        sys.stdout.write(token.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


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
        "request_id": completion.request_id,
    }
