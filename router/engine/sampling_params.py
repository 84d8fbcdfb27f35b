"""How a sequence's tokens are chosen, and what was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. The service has validated every value and filled in every default.

    Bounds are those of `SamplingParams` in inference.proto. `temperature` 0 is greedy. `stop_token_ids` holds
    the end-of-sequence ids unless the request ignores them. `logprobs` and `prompt_logprobs` are numbers of
    alternatives: None asks for no log probabilities, 0 for that of the token itself.
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
    """A token, its log probability (before temperature, bias and penalties), and the best alternatives."""

    token_id: int
    logprob: float
    # Pairs of token id and log probability, the most probable first, the lowest id first among equals.
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token that the sampler chose for one sequence."""

    token_id: int
    logprobs: TokenLogprobs | None
