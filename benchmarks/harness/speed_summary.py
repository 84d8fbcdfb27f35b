"""How fast the measured machine decodes, how many bytes that reads, and what follows for other models.

A decode step reads the router's weights, and of the experts those that at least one sequence chose. That many
bytes over the rate at which they were read is the step's time, and the only rule that carries over to a model
or a machine that was not measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from random_checkpoint import Shape

from harness.floors import distinct_experts, expert_parameters, router_parameters
from harness.result import Result, Table

# The bytes of a weight of an expert, by the kind that it is held in. A router's weights are float32 in all.
EXPERT_BYTES = {"fp32": 4, "int8": 1}
ROUTER_BYTES = 4
MIXTRAL_8X7B = Shape(hidden=4096, inner=14_336, layers=32, heads=32, kv_heads=8)


@dataclass(frozen=True, slots=True)
class Speed:
    """The measured decode steps of `sequences` sequences, with experts of one kind."""

    kind: str
    sequences: int
    step_s: float
    read_bytes: float
    # The share of greedy tokens that equal those of transformers, as text.
    same_tokens: str

    @property
    def tokens_per_s(self) -> float:
        return self.sequences / self.step_s

    @property
    def bytes_per_s(self) -> float:
        return self.read_bytes / self.step_s


def summarise(decode: Result) -> str:
    """Markdown: the measured rates, the rule that they give, and the rule applied to Mixtral 8x7B."""
    shape = Shape.of(decode.data["shape"])
    speeds = sorted(_speeds(decode, shape), key=lambda speed: (speed.kind, speed.sequences))
    kinds = dict.fromkeys(speed.kind for speed in speeds)
    return "\n\n".join(
        (
            "{cpu}, {cores} cores, {memory_gib:.0f} GiB ({features}):".format(**decode.machine),
            _measured(shape, speeds).markdown,
            "**Tokens/s ≈ sequences × rate ÷ GB read a step.** The rate here is "
            + " and ".join(_rates(kind, speeds) for kind in kinds)
            + ".",
            _forecast(MIXTRAL_8X7B, speeds).markdown,
        )
    )


def step_bytes(shape: Shape, sequences: int, kind: str) -> float:
    """The bytes of weights that a step of one token a sequence reads."""
    experts = shape.layers * distinct_experts(shape, sequences) * expert_parameters(shape)
    return EXPERT_BYTES[kind] * experts + ROUTER_BYTES * router_parameters(shape)


def held_bytes(shape: Shape, kind: str) -> float:
    """The bytes of all weights in memory."""
    # A step reads one row of the embedding; all of them are held.
    router = router_parameters(shape) + (shape.vocabulary - 1) * shape.hidden
    experts = shape.layers * shape.experts * expert_parameters(shape)
    return EXPERT_BYTES[kind] * experts + ROUTER_BYTES * router


def _speeds(decode: Result, shape: Shape) -> Iterator[Speed]:
    same = _same_tokens(decode)
    for point in decode.data["points"]:
        kind, sequences = point["experts"], round(point["rows"])
        if kind in EXPERT_BYTES:
            read = step_bytes(shape, sequences, kind)
            yield Speed(kind, sequences, point["step_s"], read, same[sequences, kind])


def _same_tokens(decode: Result) -> dict[tuple[int, str], str]:
    """The column `same tokens` of the result's table, `fp32 100%, int8 37%`, by sequences and kind."""
    table = decode.tables[0]
    batch, column = table.header.index("batch"), table.header.index("same tokens")
    return {
        (int(row[batch]), kind): share
        for row in table.rows
        for kind, share in (part.split(" ") for part in row[column].split(", "))
    }


def _measured(shape: Shape, speeds: Iterable[Speed]) -> Table:
    return Table(
        "",
        (
            "experts held in",
            "sequences at once",
            "tokens/s together",
            "each",
            "GB of weights in memory",
            "GB read a step",
            "rate, GB/s",
            "greedy tokens as in transformers",
        ),
        tuple(
            (
                speed.kind,
                str(speed.sequences),
                f"**{speed.tokens_per_s:,.0f}**",
                f"{speed.tokens_per_s / speed.sequences:,.0f}",
                _gb(held_bytes(shape, speed.kind)),
                _gb(speed.read_bytes),
                f"{speed.bytes_per_s / 1e9:.0f}",
                speed.same_tokens,
            )
            for speed in speeds
        ),
    )


def _rates(kind: str, speeds: Iterable[Speed]) -> str:
    rates = [speed.bytes_per_s / 1e9 for speed in speeds if speed.kind == kind]
    return f"{min(rates):.0f} to {max(rates):.0f} GB/s with {kind} experts"


def _forecast(shape: Shape, speeds: Iterable[Speed]) -> Table:
    """One sequence of another model, at the rate of one sequence here."""
    return Table(
        "",
        (
            "by this rule, not measured: Mixtral 8x7B, experts in",
            "GB of weights in memory",
            "GB read a token",
            "tokens/s of one sequence",
        ),
        tuple(_forecast_row(shape, speed) for speed in speeds if speed.sequences == 1),
    )


def _forecast_row(shape: Shape, speed: Speed) -> tuple[str, ...]:
    read = step_bytes(shape, 1, speed.kind)
    return (
        speed.kind,
        _gb(held_bytes(shape, speed.kind)),
        _gb(read),
        f"{speed.bytes_per_s / read:.1f}",
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 10e9 else f"{size / 1e9:,.0f}"
