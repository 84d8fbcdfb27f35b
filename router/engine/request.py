"""One request's tokens: what the service hands to the engine, and what the engine reports back.

The service owns text (tokenizer, stop strings); the engine knows token ids alone. Everything that crosses is frozen.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from opentelemetry.context import Context

from moesaic.errors import MoesaicError


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen, complete and validated: the service has filled every default in.

    Bounds are those of `SamplingParams` in inference.proto. `temperature` 0 is greedy. `stop_token_ids` holds the
    end-of-sequence ids unless the request ignores them. `logprobs` and `prompt_logprobs` count alternatives;
    None asks for no log probabilities, 0 for those of the token itself.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token, its log probability under the model (before temperature, bias and penalties), the best alternatives."""

    token_id: int
    logprob: float
    # (token id, log probability), most probable first; ties: lowest id first.
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the sampler chose for one sequence."""

    token_id: int
    logprobs: TokenLogprobs | None


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
