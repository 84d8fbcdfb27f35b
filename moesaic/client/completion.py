"""A router's output as frozen values: the tokens of a stream, and whole completions.

Part of the client library. Only the `from_pb` methods read the messages of inference.proto.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from moesaic.errors import DataLoss
from moesaic.expert_policy import ExpertPolicy, OnMissing, on_missing_of
from moesaic.v1 import inference_pb2 as pb

FinishReason = Literal["stop", "length"]

# The names that the OpenAI API uses, too.
FINISH_REASONS: dict[int, FinishReason] = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}

# The `repr` of a completion shows the beginning of its text.
_REPR_CHARS = 50


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that the model could have chosen, and its log probability. `text` and `token_bytes`: see TokenLogprob."""

    token_id: int
    logprob: float
    text: str
    token_bytes: bytes


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token with its log probability under the model, which is None for the first token of a prompt.

    `text` may hold replacement characters where the token is part of a character; `token_bytes` never does.
    """

    token_id: int
    logprob: float | None
    text: str
    token_bytes: bytes
    # Most probable first.
    top: tuple[Alternative, ...]

    @classmethod
    def from_pb(cls, entry: pb.TokenLogprob) -> Self:
        return cls(
            token_id=entry.token_id,
            logprob=entry.logprob if entry.HasField("logprob") else None,
            text=entry.text,
            token_bytes=entry.token_bytes,
            top=tuple(Alternative(top.token_id, top.logprob, top.text, top.token_bytes) for top in entry.top),
        )


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """The prompt as given to the model: token ids, text, and with `prompt_logprobs` one entry per token."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]

    @classmethod
    def from_pb(cls, prompt: pb.PromptInfo) -> Self:
        return cls(tuple(prompt.token_ids), prompt.text, tuple(map(TokenLogprob.from_pb, prompt.logprobs)))


@dataclass(frozen=True, slots=True)
class Usage:
    """The numbers of tokens of the prompt and of one continuation."""

    prompt_tokens: int
    completion_tokens: int
    # Prompt tokens whose keys and values were in the prefix cache.
    cached_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one continuation, in seconds from its admission."""

    queued_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class WeightVersion:
    """The version, named by an epoch's id, that computed the tokens [start, end) of a continuation."""

    version: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Degraded:
    """Says that an answer is not the full one, because experts had no replica left: which policy stood in for them, and for
    how many (token, layer, slot) assignments."""

    policy: OnMissing
    assignments: int

    @classmethod
    def from_pb(cls, message: pb.Degraded) -> Self:
        policy = on_missing_of(message.policy)
        if policy is None:
            raise DataLoss("the answer is degraded without a policy", reason="BAD_ANSWER")
        return cls(policy, message.assignments)


@dataclass(frozen=True, slots=True, repr=False)
class Token:
    """One token of continuation `index`; with max_tokens=0 its end alone.

    `str(token)` is its text. It is empty while a character is incomplete, or while text is held back because
    it may begin a stop string. The first item of the stream has `prompt`, too, and `experts` where the request
    restricted them; the last one of a continuation has `finish_reason`, `usage` and `timing`.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    index: int
    finish_reason: FinishReason | None
    # The stop string, or the id of the stop token, that ended the continuation.
    stop: str | None
    usage: Usage | None
    timing: Timing | None
    prompt: PromptInfo | None
    request_id: str
    model: str
    # The epoch in which every token of the answer is computed.
    epoch: str
    # In the last item, with `return_weight_versions`.
    weight_versions: tuple[WeightVersion, ...] = ()
    # The policy that was applied.
    experts: ExpertPolicy | None = None
    # How far the continuation is not the full answer so far; None where it is.
    degraded: Degraded | None = None

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        end = f", finish_reason={self.finish_reason!r}" if self.finish_reason else ""
        return f"<Token {self.text!r}, token_ids={self.token_ids}, index={self.index}{end}>"

    @classmethod
    def from_pb(cls, response: pb.GenerateResponse) -> Self:
        usage, timing = response.usage, response.timing
        return cls(
            text=response.text,
            token_ids=tuple(response.token_ids),
            logprobs=tuple(map(TokenLogprob.from_pb, response.logprobs)),
            index=response.index,
            finish_reason=FINISH_REASONS.get(response.finish_reason),
            stop=response.stop or None,
            usage=Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens)
            if response.HasField("usage")
            else None,
            timing=Timing(timing.queued_s, timing.first_token_s, timing.total_s)
            if response.HasField("timing")
            else None,
            prompt=PromptInfo.from_pb(response.prompt) if response.HasField("prompt") else None,
            request_id=response.request_id,
            model=response.model,
            epoch=response.epoch,
            weight_versions=tuple(
                WeightVersion(span.version, span.start, span.end) for span in response.weight_versions
            ),
            experts=ExpertPolicy.from_pb(response.experts) if response.HasField("experts") else None,
            degraded=Degraded.from_pb(response.degraded) if response.HasField("degraded") else None,
        )


@dataclass(frozen=True, slots=True, repr=False)
class Completion:
    """One whole continuation of one prompt. `str(completion)` is its text."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    stop: str | None
    usage: Usage
    timing: Timing
    prompt: PromptInfo
    request_id: str
    model: str
    epoch: str
    # With `return_weight_versions`.
    weight_versions: tuple[WeightVersion, ...] = ()
    # The policy that was applied; None without one.
    experts: ExpertPolicy | None = None
    # How far it is not the full answer; None where it is.
    degraded: Degraded | None = None

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= _REPR_CHARS else self.text[: _REPR_CHARS - 1] + "…"
        return f"<Completion {text!r}, completion_tokens={len(self.token_ids)}, finish_reason={self.finish_reason!r}>"

    @classmethod
    def of(cls, tokens: Sequence[Token]) -> Self:
        """The completion of one continuation's stream.

        Raises DataLoss when the stream's beginning or end is missing.
        """
        prompt = next((token.prompt for token in tokens if token.prompt is not None), None)
        last = tokens[-1] if tokens else None
        if prompt is None or last is None or not (last.finish_reason and last.usage and last.timing):
            raise DataLoss("the answer broke off without an error", reason="INCOMPLETE_ANSWER")
        return cls(
            text="".join(token.text for token in tokens),
            token_ids=tuple(token_id for token in tokens for token_id in token.token_ids),
            logprobs=tuple(entry for token in tokens for entry in token.logprobs),
            finish_reason=last.finish_reason,
            stop=last.stop,
            usage=last.usage,
            timing=last.timing,
            prompt=prompt,
            request_id=last.request_id,
            model=last.model,
            epoch=last.epoch,
            weight_versions=last.weight_versions,
            experts=next((token.experts for token in tokens if token.experts is not None), None),
            degraded=next((token.degraded for token in reversed(tokens) if token.degraded is not None), None),
        )


class TokenReader:
    """Makes tokens of the messages of one stream.

    The router sends the prompt ahead, in a message of its own; here it goes along with the first token, so
    that the first item of a stream is a token.
    """

    def __init__(self) -> None:
        # Whether a token has been returned.
        self.begun = False
        self._opening: pb.GenerateResponse | None = None

    def read(self, response: pb.GenerateResponse) -> Token | None:
        """The token of a message; None for the prompt, which is kept for the next message."""
        if response.HasField("prompt") and not response.token_ids and not response.finish_reason:
            self._opening = response
            return None
        if self._opening is not None:
            self._opening.MergeFrom(response)
            response, self._opening = self._opening, None
        self.begun = True
        return Token.from_pb(response)
