"""The figures of a load, from what its clients saw. Pure.

TTFT, the time to the first token, counts from the moment at which a request was *due*: with arrivals that do
not wait for answers, a late sender must not make the server look fast. Inter-token latency is the gap between
tokens of one request; tokens that arrive in one piece have gaps of zero between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request; times are seconds on the clock of the run.

    `error` is empty for a request that succeeded.
    """

    due_s: float
    end_s: float
    prompt_tokens: int
    # When each token arrived.
    token_times_s: tuple[float, ...]
    token_ids: tuple[int, ...] = ()
    error: str = ""
    # What the answer said that it was computed by: its epoch, and the versions of its weights.
    epochs: frozenset[str] = frozenset()
    # The HTTP status of an answer that was not begun; 0 where none came.
    status: int = 0
    # After how long the server said to come back; None where it did not say.
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Percentiles in milliseconds; None where there is no value."""

    p50_ms: float | None
    p99_ms: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        if not seconds:
            return cls(None, None)
        values = sorted(seconds)
        return cls(1000 * percentile(values, 0.50), 1000 * percentile(values, 0.99))


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """The figures of a run. Tokens of requests that failed later are included, because they were produced."""

    requests: int
    failed_requests: int
    # The number of requests that failed with each error.
    errors: dict[str, int]
    seconds: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    ttft: Percentiles
    inter_token: Percentiles

    @classmethod
    def of(cls, records: Sequence[RequestRecord]) -> LoadSummary:
        """Counts from the moment the first request was due to the end of the last.

        Failed requests give no latency.
        """
        good = [record for record in records if not record.error]
        seconds = max(record.end_s for record in records) - min(record.due_s for record in records)
        output = sum(len(record.token_times_s) for record in records)
        prompt = sum(record.prompt_tokens for record in records if record.token_times_s)
        return cls(
            requests=len(records),
            failed_requests=len(records) - len(good),
            errors=dict(Counter(record.error for record in records if record.error)),
            seconds=seconds,
            prompt_tokens=prompt,
            output_tokens=output,
            output_tokens_per_s=_per(output, seconds),
            total_tokens_per_s=_per(output + prompt, seconds),
            requests_per_s=_per(len(good), seconds),
            ttft=Percentiles.of([record.token_times_s[0] - record.due_s for record in good]),
            inter_token=Percentiles.of([gap for record in good for gap in _gaps(record.token_times_s)]),
        )


@dataclass(frozen=True, slots=True)
class WaveSummary:
    """Requests of one length that began together, comparable to a batch of a plain loop over the model."""

    # The time until every request had its first token.
    prefill_s: float
    # The rate while all of them were decoding; None when the first ended before the last began.
    decode_tokens_per_s: float | None
    # The rate from the start to the last token.
    output_tokens_per_s: float

    @classmethod
    def of(cls, records: Sequence[RequestRecord]) -> WaveSummary:
        """None of the records may have failed."""
        start_s = min(record.due_s for record in records)
        times = [record.token_times_s for record in records]
        from_s, until_s = max(each[0] for each in times), min(each[-1] for each in times)
        last_s = max(each[-1] for each in times)
        return cls(
            prefill_s=from_s - start_s,
            decode_tokens_per_s=decode_rate(times, from_s, until_s),
            output_tokens_per_s=_per(sum(map(len, times)), last_s - start_s),
        )


def decode_rate(times_s: Sequence[Sequence[float]], from_s: float, until_s: float) -> float | None:
    """Tokens per second of all requests together within a window; None where one has no rate there."""
    rates = [rate_between(each, from_s, until_s) for each in times_s]
    known = [rate for rate in rates if rate is not None]
    return sum(known) if len(known) == len(rates) else None


def rate_between(times_s: Sequence[float], from_s: float, until_s: float) -> float | None:
    """Tokens per second from the first to the last token within a window; its edges cut no step in two.

    None where the window holds no two moments at which tokens came.
    """
    inside = [at_s for at_s in times_s if from_s <= at_s <= until_s]
    return (len(inside) - 1) / (inside[-1] - inside[0]) if inside and inside[-1] > inside[0] else None


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the ordered, non-empty values lie, with interpolation."""
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def _gaps(times_s: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times_s)]


def _per(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
