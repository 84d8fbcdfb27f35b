"""One of the n answers to a request: takes the engine's events and makes the messages of the stream.

The text is decided here: incomplete characters are held until their last byte comes, and stop strings cut it.
A continuation depends on neither gRPC nor the engine. When a stop string makes `finished` true before the
engine reports an end, the service cancels the sequence.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from moesaic.errors import InvalidArgument
from moesaic.v1 import inference_pb2
from router.api.sampling_request import TextOptions
from router.engine.request import Finished, FinishReason, Started, Timing, TokenGenerated
from router.engine.sampling_params import SamplingParams, TokenLogprobs
from router.text.stop_strings import StopMatcher
from router.text.text import Text

_FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


class Continuation:
    """Makes the messages of one index: one per token, the last with finish reason, usage and timing, too.

    With max_tokens 0 there is one message, without a token.
    """

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        text: Text,
        params: SamplingParams,
        options: TextOptions,
        *,
        request_id: str,
        model: str,
        continues: bool = True,
        names_versions: bool = False,
        epoch: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`continues`: whether the text continues that of the prompt, rather than being a text of its own.
        `names_versions`: whether the last message says which versions computed the tokens."""
        self.index = index
        # Random, because a client's request id is never used as a key.
        self.sequence_id = uuid.uuid4().hex
        self.params = params
        self.model = model
        self.epoch = epoch
        self.num_tokens = 0
        self.finished = False
        # The tokens of another router, which are not sent again; and the last message, where they are all there is.
        self.received: tuple[int, ...] = ()
        self.ending: inference_pb2.GenerateResponse | None = None
        self._num_prompt_tokens = len(prompt)
        self._text = text
        self._options = options
        self._detokenizer = text.detokenizer(
            prompt if continues else (), skip_special_tokens=options.skip_special_tokens
        )
        self._matcher = StopMatcher(options.stop, include_stop=options.include_stop)
        self._request_id = request_id
        self._names_versions = names_versions
        self._clock = clock
        self._admitted_s = clock()
        self._queued_s = 0.0
        self._num_cached = 0
        self._first_token_s: float | None = None

    def message(self, **fields: Any) -> inference_pb2.GenerateResponse:
        """A message of this continuation."""
        return inference_pb2.GenerateResponse(
            request_id=self._request_id, model=self.model, epoch=self.epoch, index=self.index, **fields
        )

    def go_on_behind(self, received: Sequence[int]) -> None:
        """Begins behind tokens that the caller has. To be called first, if at all.

        Where they end the continuation, `ending` is its last message. Raises InvalidArgument if it ended before.
        """
        self.received = tuple(received)
        for token_id in self.received:
            if self.finished:
                raise InvalidArgument("resume: tokens follow the end of a continuation", field="resume")
            _, stop = self._advance(token_id)
            if stop is not None:
                self.ending = self._last("", FinishReason.STOP, stop, self._own_timing())
            elif token_id in self.params.stop_token_ids:
                self.ending = self.on_finished(Finished(FinishReason.STOP, token_id, self._own_timing()))
            elif self.num_tokens >= self.params.max_tokens:
                self.ending = self.on_finished(Finished(FinishReason.LENGTH, None, self._own_timing()))

    def on_started(self, event: Started) -> None:
        self._queued_s = event.queued_s
        # Generated tokens may be in the cache, too, where an answer is resumed.
        self._num_cached = min(event.num_cached, self._num_prompt_tokens)

    def on_token(self, event: TokenGenerated) -> inference_pb2.GenerateResponse:
        """The message of a token. It is the last one if the sequence ends with it, or it completes a stop string."""
        token = event.token
        if self._first_token_s is None:
            self._first_token_s = self._clock()
        text, stop = self._advance(token.token_id)
        logprobs = [] if token.logprobs is None else [logprob_message(self._text, token.logprobs)]
        message = self.message(text=text, token_ids=[token.token_id], logprobs=logprobs)
        if stop is not None:
            timing = self._own_timing() if event.finished is None else event.finished.timing
            message.MergeFrom(self._last(text, FinishReason.STOP, stop, timing))
        elif event.finished is not None:
            message.MergeFrom(self.on_finished(event.finished, text))
        return message

    def on_finished(self, event: Finished, text: str = "") -> inference_pb2.GenerateResponse:
        """The last message: `text` of its own token, and what has been held back so far."""
        held, stop = self._search(self._detokenizer.flush())
        if stop is not None:
            return self._last(text + held, FinishReason.STOP, stop, event.timing)
        requested = event.stop_token_id is not None and event.stop_token_id in self._options.stop_token_ids
        stop = str(event.stop_token_id) if requested else ""
        return self._last(text + held + self._matcher.flush(), event.reason, stop, event.timing)

    def _advance(self, token_id: int) -> tuple[str, str | None]:
        """Counts a token. Returns the text that it makes certain, and the stop string that it completes."""
        self.num_tokens += 1
        if token_id in self.params.stop_token_ids and not self._options.include_stop:
            return "", None
        return self._search(self._detokenizer.push(token_id))

    def _search(self, piece: str) -> tuple[str, str | None]:
        """Looks for stop strings, from the token on that fulfils min_tokens."""
        if self.num_tokens < self.params.min_tokens:
            return piece, None
        return self._matcher.push(piece)

    def _last(
        self, text: str, reason: FinishReason, stop: str, timing: Timing
    ) -> inference_pb2.GenerateResponse:
        self.finished = True
        return self.message(
            text=text,
            finish_reason=_FINISH_REASONS[reason],
            stop=stop,
            usage=inference_pb2.Usage(
                prompt_tokens=self._num_prompt_tokens,
                completion_tokens=self.num_tokens,
                cached_prompt_tokens=self._num_cached,
            ),
            timing=inference_pb2.Timing(
                queued_s=timing.queued_s, first_token_s=timing.first_token_s, total_s=timing.total_s
            ),
            weight_versions=self._weight_versions() if self._names_versions else (),
        )

    def _weight_versions(self) -> list[inference_pb2.WeightVersion]:
        """One span, since a sequence keeps its epoch; none without a token."""
        if not self.num_tokens:
            return []
        return [inference_pb2.WeightVersion(version=self.epoch, start=0, end=self.num_tokens)]

    def _own_timing(self) -> Timing:
        """The times of a sequence that a stop string ends, since the engine then reports none."""
        now = self._clock()
        first_token_s = (self._first_token_s or now) - self._admitted_s
        return Timing(queued_s=self._queued_s, first_token_s=first_token_s, total_s=now - self._admitted_s)


def prompt_message(
    token_ids: Sequence[int], prompt_text: str, text: Text, scores: Sequence[TokenLogprobs] | None
) -> inference_pb2.PromptInfo:
    """The prompt as it was read. With `scores` (from its second token on) it has one entry per token."""
    info = inference_pb2.PromptInfo(token_ids=token_ids, text=prompt_text)
    if scores is not None:
        spelled, spelled_bytes = text.spell(token_ids[0])
        info.logprobs.add(token_id=token_ids[0], text=spelled, token_bytes=spelled_bytes)
        info.logprobs.extend(logprob_message(text, score) for score in scores)
    return info


def logprob_message(text: Text, logprobs: TokenLogprobs) -> inference_pb2.TokenLogprob:
    spelled, spelled_bytes = text.spell(logprobs.token_id)
    return inference_pb2.TokenLogprob(
        token_id=logprobs.token_id,
        logprob=logprobs.logprob,
        text=spelled,
        token_bytes=spelled_bytes,
        top=[_alternative(text, token_id, logprob) for token_id, logprob in logprobs.top],
    )


def _alternative(text: Text, token_id: int, logprob: float) -> inference_pb2.Alternative:
    spelled, spelled_bytes = text.spell(token_id)
    return inference_pb2.Alternative(
        token_id=token_id, logprob=logprob, text=spelled, token_bytes=spelled_bytes
    )
