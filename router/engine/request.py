"""One request's tokens: what the service hands to the engine, and what the engine reports back.

The service owns text (tokenizer, stop strings); the engine knows token ids alone. Everything that crosses is frozen.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from opentelemetry.context import Context

from moesaic.errors import MoesaicError
from router.engine.sampling_params import SampledToken, SamplingParams, TokenLogprobs


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from admission: until the first step, the first token, the end."""

    queued_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Started:
    """The first step of a sequence begins, `queued_s` seconds after its admission. Its first `num_cached` tokens were
    in the prefix cache."""

    queued_s: float
    num_cached: int = 0


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Log probabilities of the prompt's tokens from the second on; sent once, before the first token."""

    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class TokenGenerated:
    """The next token of a sequence. A stop token is reported too, followed by Finished."""

    token: SampledToken


@dataclass(frozen=True, slots=True)
class Finished:
    """The sequence ended well; nothing follows. With max_tokens 0 it comes after the prompt was computed."""

    reason: FinishReason
    # The stop token that ended it, if one did.
    stop_token_id: int | None
    timing: Timing


@dataclass(frozen=True, slots=True)
class Failed:
    """The sequence ended with an error of its own; nothing follows."""

    error: MoesaicError


SequenceEvent = Started | PromptScored | TokenGenerated | Finished | Failed


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One continuation to compute.

    `on_event` is called on the engine's thread, in order; it must neither block nor raise. `deadline_s` is a time of
    the monotonic clock. `trace` is the context that the layers' spans belong to. `tenant` is whom it is for: see
    fair_queue.py and prefix_cache.py.
    """

    sequence_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    deadline_s: float
    on_event: Callable[[SequenceEvent], None]
    trace: Context | None = None
    tenant: str = ""
    # Where an encoder reads the prompt: what the decoder is given before it generates, behind its start token.
    decoder_prompt: tuple[int, ...] = ()
