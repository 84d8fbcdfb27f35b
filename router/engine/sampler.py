"""Logits to token ids: penalties, filters, the draw, and log probabilities.

The token of a sequence depends on its own logits, parameters, seed and place alone, never on its batch mates:
every row is computed by itself, and a draw inverts the cumulative distribution at a number that is a function
of the seed and of the token's place in the output. There is no state, so another router goes on where one
stopped. The order is that of vLLM: repetition, presence and frequency penalties, logit bias,
min_tokens, temperature, top-k, min-p, top-p. Each filter sees what the one before it left, renormalised.
Equal logits always rank by id, the lowest first.

Shapes: N sequences, V vocabulary, T positions of a prompt, M rows of a group, K ranked candidates.
"""

from __future__ import annotations

import enum
import math
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from moesaic.errors import DataLoss, MoesaicError
from router.engine.sampling_params import SampledToken, SamplingParams, TokenLogprobs
from router.top_k import top_ids

# The number of a prompt's positions that are scored at once, which bounds the memory of [T, V] intermediates.
_SCORED_ROWS = 64
# The numbers of candidates that are ranked for min-p and top-p before the whole vocabulary is.
_WIDTHS = (128, 2048)
# How many more candidates than wanted a ranking looks at, for the sake of equal scores.
_SPARE = 16


@dataclass(frozen=True, slots=True)
class SamplingState:
    """What the sampler needs of one sequence. The next token is the one at place `len(output)`."""

    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[SampledToken | MoesaicError]:
    """Chooses the next token of every sequence from logits [N, V] of any float dtype, which stay unchanged.

    A row with a NaN or an infinity yields DataLoss in its place and does not affect the others.
    """
    assert logits.dim() == 2 and logits.shape[0] == len(states)
    scores = logits.float()
    finite = _finite(scores)
    if not all(finite):
        good = [row for row, is_finite in enumerate(finite) if is_finite]
        scores, states = scores[good], [states[row] for row in good]
    sampled = iter(_sample_finite(scores, states))
    return [next(sampled) if is_finite else _not_finite() for is_finite in finite]


def score(logits: Tensor, targets: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log probabilities of tokens and `num_top` alternatives. Row t of logits [T, V] predicts targets[t].

    Raises DataLoss when a logit is NaN or infinite.
    """
    assert logits.dim() == 2 and logits.shape[0] == len(targets)
    scored: list[TokenLogprobs] = []
    for start in range(0, len(targets), _SCORED_ROWS):
        rows = logits[start : start + _SCORED_ROWS].float()
        if not all(_finite(rows)):
            raise _not_finite()
        scored += _token_logprobs(rows, targets[start : start + _SCORED_ROWS], num_top)
    return scored


def _finite(scores: Tensor) -> list[bool]:
    """For each row of scores [N, V], whether all of it is finite."""
    # A value that is not finite makes the row's sum so. The sum of finite scores may overflow, too; then the
    # extremes decide, since a NaN is both of them.
    if all(map(math.isfinite, scores.sum(dim=-1).tolist())):
        return [True] * len(scores)
    extremes = torch.stack((scores.amax(dim=-1), scores.amin(dim=-1)))
    return [bool(is_finite) for is_finite in torch.isfinite(extremes).all(dim=0).tolist()]


def _not_finite() -> DataLoss:
    return DataLoss("the model computed a value that is not finite", reason="NON_FINITE_LOGITS")


def _sample_finite(scores: Tensor, states: Sequence[SamplingState]) -> list[SampledToken]:
    chosen = _choose(_adjust(scores, states), states)
    tokens = [SampledToken(token_id, None) for token_id in chosen]
    wanted = [row for row, state in enumerate(states) if state.params.logprobs is not None]
    if wanted:
        num_top = [states[row].params.logprobs or 0 for row in wanted]
        found = _token_logprobs(scores[wanted], [chosen[row] for row in wanted], max(num_top))
        for row, logprobs, num in zip(wanted, found, num_top, strict=True):
            trimmed = TokenLogprobs(logprobs.token_id, logprobs.logprob, logprobs.top[:num])
            tokens[row] = SampledToken(chosen[row], trimmed)
    return tokens


# Penalties, bias and min_tokens, applied to the rows that ask for them alone.


def _adjust(scores: Tensor, states: Sequence[SamplingState]) -> Tensor:
    rows = [row for row, state in enumerate(states) if _is_adjusted(state)]
    if not rows:
        return scores
    adjusted = scores.clone()
    for row in rows:
        _penalise(adjusted[row], states[row])
        _bias(adjusted[row], states[row])
    return adjusted


def _is_adjusted(state: SamplingState) -> bool:
    params = state.params
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or bool(params.logit_bias)
        or len(state.output) < params.min_tokens
    )


def _penalise(scores: Tensor, state: SamplingState) -> None:
    """Changes scores [V] in place: repetition over prompt and output, the others over the output."""
    params = state.params
    if params.repetition_penalty != 1:
        seen = _indices({*state.prompt, *state.output}, scores)
        values = scores[seen]
        penalised = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
        # A tiny penalty must not lead to an infinity, which a softmax cannot handle.
        scores[seen] = penalised.clamp(max=torch.finfo(scores.dtype).max)
    if state.output and (params.presence_penalty != 0 or params.frequency_penalty != 0):
        counts = Counter(state.output)
        times = torch.tensor(list(counts.values()), dtype=scores.dtype, device=scores.device)
        scores[_indices(counts, scores)] -= params.frequency_penalty * times + params.presence_penalty


def _bias(scores: Tensor, state: SamplingState) -> None:
    """Changes scores [V] in place: adds the request's bias, and rules out stop tokens before min_tokens."""
    params = state.params
    if params.logit_bias:
        values = torch.tensor(list(params.logit_bias.values()), dtype=scores.dtype, device=scores.device)
        scores[_indices(params.logit_bias, scores)] += values
    if len(state.output) < params.min_tokens and params.stop_token_ids:
        scores[_indices(params.stop_token_ids, scores)] = -torch.inf


def _indices(token_ids: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(list(token_ids), dtype=torch.long, device=like.device)


# The choice: an argmax for greedy rows, the inverted cumulative distribution for the others.


class _Kind(enum.Enum):
    """The computation by which the token of a row is chosen."""

    GREEDY = enum.auto()
    # The whole vocabulary is drawn from, without a filter and thus without a ranking.
    PLAIN = enum.auto()
    # Top-k bounds the number of candidates.
    NARROW = enum.auto()
    # Top-p or min-p apply without top-k, so every token is a candidate.
    WIDE = enum.auto()


def _choose(scores: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """scores [N, V] -> N token ids. Rows of one kind are computed together, and none depends on another."""
    chosen = [0] * len(states)
    groups: dict[_Kind, list[int]] = {}
    for row, state in enumerate(states):
        groups.setdefault(_kind(state.params, scores.shape[1]), []).append(row)
    for kind, rows in groups.items():
        group = scores if len(rows) == len(states) else scores[rows]
        members = [states[row] for row in rows]
        for row, token_id in zip(rows, _choose_group(kind, group, members), strict=True):
            chosen[row] = token_id
    return chosen


def _kind(params: SamplingParams, vocab_size: int) -> _Kind:
    if params.greedy:
        return _Kind.GREEDY
    if 0 < params.top_k < vocab_size:
        return _Kind.NARROW
    return _Kind.PLAIN if params.top_p == 1 and params.min_p == 0 else _Kind.WIDE


def _choose_group(kind: _Kind, scores: Tensor, states: Sequence[SamplingState]) -> list[int]:
    if kind is _Kind.GREEDY:
        return _ids(scores.argmax(dim=-1))
    if kind is _Kind.PLAIN:
        return _ids(_draw(_weights(scores, states), states))
    if kind is _Kind.WIDE:
        return _choose_wide(scores, states)
    candidates = _ranked(scores, max(state.params.top_k for state in states))
    weights = _weights(scores.gather(1, candidates), states)
    return _pick(candidates, _filtered(weights, states), states)


def _choose_wide(scores: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """Ranks only as many candidates as min-p and top-p may leave: few as a rule, all where a row is flat."""
    weights = _weights(scores, states)
    total = _left_by_min_p(weights, states).cumsum(dim=-1)[:, -1:]
    chosen = [0] * len(states)
    rows = list(range(len(states)))
    for width in (*_WIDTHS, scores.shape[1]):
        some = slice(None) if len(rows) == len(states) else rows
        candidates = _ranked(scores[some], min(width, scores.shape[1]))
        ranked = weights[some].gather(1, candidates)
        kept = _filtered(ranked, [states[row] for row in rows], total[some])
        # Where the lightest candidate is filtered out, so are all tokens that are lighter.
        is_all = [width >= scores.shape[1] or weight == 0 for weight in kept[:, -1].tolist()]
        done = [place for place, complete in enumerate(is_all) if complete]
        if done:
            members = [states[rows[place]] for place in done]
            for place, token_id in zip(done, _pick(candidates[done], kept[done], members), strict=True):
                chosen[rows[place]] = token_id
        rows = [row for row, complete in zip(rows, is_all, strict=True) if not complete]
        if not rows:
            break
    return chosen


def _pick(candidates: Tensor, weights: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """candidates and weights [M, K] -> one candidate of each row."""
    return _ids(candidates.gather(1, _draw(weights, states).unsqueeze(1)).squeeze(1))


def _ids(token_ids: Tensor) -> list[int]:
    return [int(token_id) for token_id in token_ids.tolist()]


def _weights(scores: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Unnormalised probabilities [M, K] after temperature; the best token of a row weighs 1.

    In float64, so that a temperature near zero stays finite and a sum over a large vocabulary exact.
    """
    temperature = _column([state.params.temperature for state in states], scores.device)
    wide = scores.double()  # a copy, changed in place below because a vocabulary is large
    return wide.sub_(wide.amax(dim=-1, keepdim=True)).div_(temperature).exp_()


def _filtered(weights: Tensor, states: Sequence[SamplingState], total: Tensor | None = None) -> Tensor:
    """Top-k, min-p, top-p over ranked candidates: weights [M, K], heaviest first -> [M, K] with zeros.

    Top-p keeps the fewest candidates whose share of what top-k and min-p left reaches it, and always the
    first. `total` [M, 1] is the mass of all that these two left, needed where not all are candidates.
    """
    num_candidates = weights.shape[1]
    top_k = _column([state.params.top_k or num_candidates for state in states], weights.device)
    top_p = _column([state.params.top_p for state in states], weights.device)
    rank = torch.arange(num_candidates, device=weights.device)
    kept = _left_by_min_p(weights, states) * (rank < top_k)
    mass = kept.cumsum(dim=-1)
    mass_before = torch.nn.functional.pad(mass[:, :-1], (1, 0))
    total = mass[:, -1:] if total is None else total
    return kept * ((mass_before < top_p * total) | (top_p == 1) | (rank == 0))


def _left_by_min_p(weights: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """weights [M, K] -> [M, K] with zeros where min-p rules a token out."""
    if not any(state.params.min_p for state in states):
        return weights
    return weights * (weights >= _column([state.params.min_p for state in states], weights.device))


def _draw(weights: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """weights [M, K] -> positions [M]: one random number of each sequence through the inverse distribution."""
    mass = weights.cumsum(dim=-1)
    total = mass[:, -1:]
    target = _column([_uniform(state) for state in states], weights.device) * total
    # The product may round up to the total, beyond which there is no token.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, target, right=True).squeeze(1)


def _uniform(state: SamplingState) -> float:
    """The random number in [0, 1) for the next token: 53 bits of a hash of the seed and the token's place."""
    place = struct.pack("<qQ", state.params.seed, len(state.output))
    bits: int = int.from_bytes(blake2b(place, digest_size=8).digest(), "little")
    return (bits >> 11) * 2.0**-53


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(1)


# Ranking and log probabilities.


def _ranked(scores: Tensor, num: int) -> Tensor:
    """Ids of the `num` highest of scores [M, V] -> [M, num], highest first; equal scores by id, lowest first.

    A plain top-k of a few more leaves few candidates to put in order, unless equal scores extend beyond it.
    """
    width = num + _SPARE
    if width >= scores.shape[1]:
        return top_ids(scores, torch.arange(scores.shape[1], device=scores.device), num)
    values, ids = scores.topk(width, dim=-1)
    ranked = top_ids(values, ids, num)
    tied = values[:, num - 1] == values[:, -1]
    if tied.any():
        everything = torch.arange(scores.shape[1], device=scores.device)
        ranked[tied] = top_ids(scores[tied], everything, num)
    return ranked


def _token_logprobs(scores: Tensor, targets: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log probabilities of one target a row, from scores [M, V] in float32 before any adjustment."""
    logprobs = scores.log_softmax(dim=-1)
    target = torch.tensor(targets, dtype=torch.long, device=scores.device).unsqueeze(1)
    of_target = logprobs.gather(1, target).squeeze(1).tolist()
    if num_top == 0:
        return [
            TokenLogprobs(token_id, logprob, ()) for token_id, logprob in zip(targets, of_target, strict=True)
        ]
    # Ranked by score, because rounding makes some log probabilities equal whose scores differ.
    top = _ranked(scores, min(num_top, scores.shape[1]))
    pairs = zip(top.tolist(), logprobs.gather(1, top).tolist(), strict=True)
    return [
        TokenLogprobs(token_id, logprob, tuple(zip(ids, values, strict=True)))
        for token_id, logprob, (ids, values) in zip(targets, of_target, pairs, strict=True)
    ]
