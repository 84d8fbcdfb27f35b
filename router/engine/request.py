"""What the service submits to the engine, a sequence request, and the events that the engine reports back.

Text (tokenizer, stop strings) belongs to the service; the engine works on token ids alone. All is frozen.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from opentelemetry.context import Context

from moesaic.errors import MoesaicError
from moesaic.expert_policy import OnMissing
from router.decoders.capture import Capture
from router.engine.sampling_params import SampledToken, SamplingParams, TokenLogprobs
from router.gating.model_view import ModelView
from router.scheduling.admission import Cost


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from admission to the first step, to the first token, and to the end."""

    queued_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Started:
    """The first step begins, `queued_s` seconds after admission, with `num_cached` tokens from the cache."""

    queued_s: float
    num_cached: int = 0


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Log probabilities of the prompt's tokens from the second on. Reported once, before the first token."""

    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The sequence ended as it should; nothing follows. An event of its own with max_tokens 0 alone, after the prompt
    is computed: otherwise it comes with the last token."""

    reason: FinishReason
    # The stop token that ended it, if one did.
    stop_token_id: int | None
    timing: Timing
    # The assignments to experts that were substituted or left out so far.
    num_degraded: int = 0


@dataclass(frozen=True, slots=True)
class TokenGenerated:
    """The next token of a sequence, with the end that it brings, if it does. A stop token is reported too."""

    token: SampledToken
    finished: Finished | None = None
    # The assignments to experts that were substituted or left out so far.
    num_degraded: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """The sequence ended with an error; nothing follows."""

    error: MoesaicError


SequenceEvent = Started | PromptScored | TokenGenerated | Finished | Failed


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One continuation to compute.

    `on_event` is called on the engine's thread, in order, and must neither block nor raise. `deadline_s` is a
    time of the monotonic clock. `trace` is the parent of the layers' spans. `tenant` names whom the sequence
    is computed for: fair_queue.py admits and prefix_cache.py shares prefixes by it.
    """

    sequence_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    deadline_s: float
    on_event: Callable[[SequenceEvent], None]
    # The model as this sequence sees it, to its last token.
    view: ModelView
    trace: Context | None = None
    tenant: str = ""
    # The same for all sequences of one call, which share places with other calls; empty: a call of its own.
    call: str = ""
    # What the decoder is given after its start token, where an encoder reads the prompt.
    decoder_prompt: tuple[int, ...] = ()
    # What another router has generated. It counts as output of this sequence, but is not reported again.
    generated: tuple[int, ...] = ()
    # What happens where no replica of an expert is left.
    on_missing: OnMissing = "fail"
    # Takes the hidden states of the prompt's tokens. Only without anything to generate or to score.
    capture: Capture | None = None

    @property
    def cost(self) -> Cost:
        """What it needs at most. What another router has generated has to be read again, and not to be generated."""
        return Cost(
            len(self.prompt) + len(self.decoder_prompt) + len(self.generated),
            max(0, self.sampling.max_tokens - len(self.generated)),
        )
