"""The judged comparisons: each has a bound that it must reach, and one from which it is excellent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["excellent", "met", "missed"]


@dataclass(frozen=True, slots=True)
class Target:
    """One row of the judged table."""

    key: str
    comparison: str
    must: float
    excellent: float
    better: Literal["higher", "lower"]
    unit: str

    def verdict(self, value: float) -> Verdict:
        def reaches(bound: float) -> bool:
            return value >= bound if self.better == "higher" else value <= bound

        return "excellent" if reaches(self.excellent) else "met" if reaches(self.must) else "missed"


def _over(key: str, comparison: str, must: float, excellent: float) -> Target:
    return Target(key, comparison, must, excellent, "higher", "x")


def _within(key: str, comparison: str, must: float, excellent: float, unit: str = "x") -> Target:
    return Target(key, comparison, must, excellent, "lower", unit)


TARGETS: tuple[Target, ...] = (
    _over("decode-fp32-b1", "decode tokens/s over `transformers`, batch 1", 0.95, 1.2),
    _over("decode-fp32-b4", "the same, batch 4", 1.0, 1.3),
    _over("decode-fp32-b16", "the same, batch 16", 1.3, 1.7),
    _over("decode-int8-b1", "with int8 experts, batch 1", 1.0, 1.4),
    _over("decode-int8-b4", "with int8 experts, batch 4", 1.3, 1.8),
    _over("decode-int8-b16", "with int8 experts, batch 16", 1.9, 2.5),
    _over(
        "canary-swap",
        "decode tokens/s with a canary of swapped experts on half of 16 streams, over one epoch",
        0.9,
        0.97,
    ),
    _over("canary-add", "the same, a canary of added experts", 0.9, 0.97),
    _over("prefill-512", "prefill of 512 tokens over `transformers`", 1.0, 1.2),
    _over("hivemind-1", "one MoE layer over hivemind's RemoteMixtureOfExperts, 1 token", 3.0, 4.0),
    _over("hivemind-16", "the same, 16 tokens", 6.0, 8.0),
    _over(
        "llamacpp-rpc-b1", "batch-1 decode over llama.cpp with its experts on an rpc server, f32", 1.0, 1.3
    ),
    _within("overhead-grpc", "overhead per layer in place, one worker, gRPC", 1.0, 0.5, "ms"),
    _within("overhead-shared-memory", "the same over shared memory", 0.3, 0.15, "ms"),
    _within("wave-grpc", "one wave to 4 workers over a bare unix-socket fan-out, gRPC", 12.0, 8.0),
    _within("wave-shared-memory", "the same over shared memory", 3.0, 1.5),
    _within(
        "router-floor", "router time of a step that is not waiting, batch 1, over its byte floor", 2.0, 1.4
    ),
    _within(
        "layer-call-sum", "layer call p50: 64 rows x 2048 bf16, top-8 of 128, 2 workers, sum", 4.0, 2.5, "ms"
    ),
    _over("goodput-64", "goodput with 64 open streams over one request after another", 3.0, 4.0),
    _within(
        "prefix-256", "shared 256-token prefix: time to first token with the cache over without", 0.4, 0.25
    ),
    _within(
        "stall-512", "inter-token p99 of 8 streams while a 512-token prompt is read, over quiet", 3.0, 2.0
    ),
    _over("tracing", "tokens/s with 1 % of traces sampled over tracing off", 0.98, 0.99),
    _within("rss-growth", "RSS growth over 2,000 requests after warm-up", 30.0, 10.0, "MB"),
    _within("kv-leak", "KV blocks in use after them", 0.0, 0.0, "blocks"),
)

BY_KEY = {target.key: target for target in TARGETS}
