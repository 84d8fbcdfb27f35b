"""Readiness: a router is ready when one real token has passed through every layer."""

from __future__ import annotations

import asyncio
import time

from router.engine.engine import Engine
from router.engine.request import Failed, SequenceEvent, SequenceRequest, TokenGenerated
from router.engine.sampling_params import SamplingParams
from router.gating.model_view import ModelView


async def pass_one_token(engine: Engine, view: ModelView, timeout_s: float) -> None:
    """Generates one token through every layer of this view. Raises the error with which it fails."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[None] = loop.create_future()

    def report(event: SequenceEvent) -> None:
        loop.call_soon_threadsafe(resolve, event)

    def resolve(event: SequenceEvent) -> None:
        if answer.done():
            return
        if isinstance(event, Failed):
            answer.set_exception(event.error)
        elif isinstance(event, TokenGenerated):
            answer.set_result(None)

    engine.submit(
        SequenceRequest(
            sequence_id="readiness",
            prompt=(0,),
            sampling=SamplingParams(max_tokens=1, temperature=0.0),
            deadline_s=time.monotonic() + timeout_s,
            on_event=report,
            view=view,
        )
    )
    await answer
