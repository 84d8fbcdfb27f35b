"""The output of one HTTP request so far, collected from all its calls to routers.

A piece is what one message adds to one choice, or a whole choice. Streamed chunks and whole replies are both
rendered from pieces, by the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moesaic.client.completion import FINISH_REASONS
from moesaic.errors import DataLoss
from moesaic.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class Piece:
    """An addition to choice `index`. `is_first`: the choice had nothing before it."""

    index: int
    is_first: bool
    prompt: pb.PromptInfo
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[pb.TokenLogprob, ...]
    finish_reason: str | None
    # The stop string or the id of the stop token that ended it; empty without one.
    stop: str
    epoch: str
    # With the end of the choice, where they were asked for.
    weight_versions: tuple[pb.WeightVersion, ...]
    # How far the choice is not the full answer, with its end; None where it is, or the end is yet to come.
    degraded: pb.Degraded | None = None


class RequestOutput:
    """The choices of one request: `num_prompts` x `num_choices`, numbered prompt by prompt."""

    def __init__(self, num_prompts: int, num_choices: int) -> None:
        self.model = ""
        # The policy that the routers applied; None without one.
        self.experts: pb.ExpertPolicy | None = None
        # The epoch of each prompt that has an answer.
        self._epochs: dict[int, str] = {}
        # The strongest word of each choice that is not the full answer.
        self._degraded: dict[int, pb.Degraded] = {}
        self._num_choices = num_choices
        self._unfinished = set(range(num_prompts * num_choices))
        self._prompts: dict[int, pb.PromptInfo] = {}
        # The count of each choice that has begun.
        self._completion_tokens: dict[int, int] = {}
        # For each prompt with a finished choice, the fewest tokens that any of its choices found in the
        # cache.
        self._cached_tokens: dict[int, int] = {}

    @property
    def epoch(self) -> str:
        """The epoch of the answer; several, with commas, where it changed between the prompts of one request."""
        return ",".join(dict.fromkeys(self._epochs[number] for number in sorted(self._epochs)))

    @property
    def degraded(self) -> pb.Degraded | None:
        """How far the choices together are not the full answer; None where they are."""
        if not self._degraded:
            return None
        words = list(self._degraded.values())
        return pb.Degraded(policy=words[0].policy, assignments=sum(word.assignments for word in words))

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self._prompts.values())

    @property
    def completion_tokens(self) -> int:
        return sum(self._completion_tokens.values())

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens from the prefix cache. Choices that share their prompt do not count as hits."""
        return sum(self._cached_tokens.values())

    def add(self, prompt_number: int, message: pb.GenerateResponse) -> Piece | None:
        """Adds a message. Returns None for one that holds nothing but the prompt."""
        self.model = message.model
        self._epochs[prompt_number] = message.epoch
        if message.HasField("experts"):
            self.experts = message.experts
        if message.HasField("prompt"):
            self._prompts[prompt_number] = message.prompt
        if not (message.token_ids or message.text or message.finish_reason):
            return None
        index = prompt_number * self._num_choices + message.index
        is_first = index not in self._completion_tokens
        known = self._degraded.get(index, pb.Degraded())
        # A router that goes on with the answer of another one counts anew.
        if message.degraded.assignments > known.assignments:
            self._degraded[index] = message.degraded
        self._completion_tokens[index] = self._completion_tokens.get(index, 0) + len(message.token_ids)
        finish_reason = FINISH_REASONS.get(message.finish_reason)
        if finish_reason is not None:
            self._completion_tokens[index] = message.usage.completion_tokens
            cached = message.usage.cached_prompt_tokens
            self._cached_tokens[prompt_number] = min(cached, self._cached_tokens.get(prompt_number, cached))
            self._unfinished.discard(index)
        return Piece(
            index=index,
            is_first=is_first,
            prompt=self._prompts.get(prompt_number, pb.PromptInfo()),
            text=message.text,
            token_ids=tuple(message.token_ids),
            logprobs=tuple(message.logprobs),
            finish_reason=finish_reason,
            stop=message.stop,
            epoch=message.epoch,
            weight_versions=tuple(message.weight_versions),
            degraded=self._degraded.get(index) if finish_reason is not None else None,
        )

    def check_complete(self) -> None:
        """Raises DataLoss when a choice has no finish reason although its call ended without an error."""
        if self._unfinished:
            raise DataLoss("the answer broke off", reason="INCOMPLETE_ANSWER")


def join(pieces: Sequence[Piece]) -> Piece:
    """One piece made of all the pieces of a choice, in order."""
    last = pieces[-1]
    return Piece(
        index=last.index,
        is_first=True,
        prompt=last.prompt,
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token_id for piece in pieces for token_id in piece.token_ids),
        logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
        finish_reason=last.finish_reason,
        stop=last.stop,
        epoch=last.epoch,
        weight_versions=last.weight_versions,
        degraded=last.degraded,
    )


def separate_end(piece: Piece) -> list[Piece]:
    """The piece as one with its text and tokens and one with its end, where it has both text and an end."""
    if piece.finish_reason is None or not piece.text:
        return [piece]
    end = replace(piece, is_first=False, text="", token_ids=(), logprobs=())
    return [replace(piece, finish_reason=None, stop="", weight_versions=(), degraded=None), end]
