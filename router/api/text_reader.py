"""Reads texts through the engine for what their hidden states say: as sequences like all others, of a tenant of their own,
that generate nothing and take nothing from the prefix cache.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from moesaic.errors import InvalidArgument, Unsupported
from router.api.event_bridge import EventBridge
from router.api.generate_call import SequenceEngine
from router.decoders.capture import Capture
from router.engine.request import Failed, Finished, SequenceEvent, SequenceRequest
from router.engine.sampling_params import SamplingParams
from router.gating.gate import Gate
from router.gating.model_view import ModelView
from router.text.text import Text

MAX_TEXTS = 256
MAX_TOKENS = 64 << 10
# How many of a call's texts are in the engine at a time.
_AT_ONCE = 8
# No client's tenant, as these have no zero byte.
_TENANT = "\0operator"

TokenIds = tuple[int, ...]


class TextReader:
    """Reads texts with one model. To be created, and used, on the event loop; `tokens` may run beside it."""

    def __init__(
        self,
        engine: SequenceEngine,
        text: Text,
        gates: Mapping[int, Gate],
        view: Callable[[], ModelView],
        *,
        max_model_len: int,
    ) -> None:
        """`view`: what computes a request without a policy."""
        self.gates = gates
        self.view = view
        self._engine = engine
        self._text = text
        self._max_model_len = max_model_len
        self._bridge = EventBridge()

    def tokens(self, texts: Sequence[str]) -> list[TokenIds]:
        """Raises InvalidArgument, field `texts`, for too much or too little; Unsupported where the model has no tokenizer, or
        no gate whose input can be read."""
        if not self.gates:
            raise Unsupported("model: the gates of this model cannot be read", field="model")
        if not self._text.has_tokenizer:
            raise Unsupported("texts: this model has no tokenizer", field="texts")
        if not 1 <= len(texts) <= MAX_TEXTS:
            raise InvalidArgument(f"texts: must be 1 to {MAX_TEXTS}", field="texts")
        found = [self._text.encode(text, add_special_tokens=True) for text in texts]
        for index, tokens in enumerate(found):
            if not 1 <= len(tokens) <= self._max_model_len:
                field = f"texts[{index}]"
                raise InvalidArgument(f"{field}: must be 1 to {self._max_model_len} tokens", field=field)
        if sum(map(len, found)) > MAX_TOKENS:
            raise InvalidArgument(f"texts: must be at most {MAX_TOKENS} tokens in all", field="texts")
        return found

    async def read(
        self,
        texts: Sequence[TokenIds],
        view: ModelView,
        capture_of: Callable[[TokenIds], Capture],
        timeout_s: float,
    ) -> None:
        """Returns when all texts have been read. Raises the first error of any; the others then end."""
        places = asyncio.Semaphore(_AT_ONCE)
        deadline_s = time.monotonic() + timeout_s

        async def read_one(tokens: TokenIds) -> None:
            async with places:
                await self._read_one(tokens, view, capture_of(tokens), deadline_s)

        reading = [asyncio.create_task(read_one(tokens)) for tokens in texts]
        try:
            await asyncio.gather(*reading)
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)

    async def _read_one(self, tokens: TokenIds, view: ModelView, capture: Capture, deadline_s: float) -> None:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def take(event: SequenceEvent) -> None:
            if ended.done():
                return
            if isinstance(event, Failed):
                ended.set_exception(event.error)
            elif isinstance(event, Finished):
                ended.set_result(None)

        sequence_id = uuid.uuid4().hex
        self._engine.submit(
            SequenceRequest(
                sequence_id=sequence_id,
                prompt=tokens,
                sampling=SamplingParams(max_tokens=0, temperature=0.0),
                deadline_s=deadline_s,
                on_event=partial(self._bridge.put, take),
                view=view,
                tenant=_TENANT,
                capture=capture,
            )
        )
        try:
            await ended
        finally:
            self._engine.cancel(sequence_id)
