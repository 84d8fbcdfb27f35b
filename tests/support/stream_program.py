"""A program that streams from one router for some time and prints what came of it, for a host of its own.

`python stream_program.py HOST:PORT STREAMS SECONDS`: one line of JSON with the errors, and the different answers.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from moesaic import Client
from moesaic.errors import MoesaicError

PROMPT = [5, 17, 42, 8]
# Longer than the longest pause that a silent host may cause.
TIMEOUT_S = 60.0


async def stream(client: Client, end_s: float, answers: list[tuple[int, ...]], errors: list[str]) -> None:
    while time.monotonic() < end_s:
        try:
            answer = await client.complete(
                PROMPT, max_tokens=24, temperature=0.0, ignore_eos=True, timeout_s=TIMEOUT_S
            )
            answers.append(answer.token_ids)
        except MoesaicError as error:
            errors.append(error.message)
            await asyncio.sleep(0.1)


async def main(target: str, num_streams: int, seconds: float) -> None:
    answers: list[tuple[int, ...]] = []
    errors: list[str] = []
    end_s = time.monotonic() + seconds
    async with Client(target) as client:
        await asyncio.gather(*(stream(client, end_s, answers, errors) for _ in range(num_streams)))
    print(json.dumps({"errors": errors, "answers": sorted(set(answers)), "count": len(answers)}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
