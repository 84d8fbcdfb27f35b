"""A model of step time, fitted to measurements, checked by simulation, and applied to larger clusters.

Reads the points of decode.json, prefill.json and placement.json; writes scaling.json and two pictures. The
equations are in steps/model.py, the simulation is in steps/simulation.py, and the clusters are in
steps/clusters.py.

Run after the others: python benchmarks/scaling.py [--out benchmarks/results] [--pictures docs]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from harness import options
from harness.floors import expert_parameters, router_parameters
from harness.result import Figure, Result, Table, conclude
from random_checkpoint import Shape
from steps.chart import draw_clusters, draw_steps
from steps.clusters import (
    EIGHT_220B,
    H200,
    H200_GRPC,
    H200_LEAN,
    H200_MEMORY_BYTES,
    MIXTRAL_8X7B,
    NODES,
    Forecast,
    Kind,
    experts_bytes,
    forecast,
    router_bytes,
)
from steps.fit import Fit, Point, fit_costs
from steps.model import Load, ModelShape, Node, step_time
from steps.simulation import simulate

SOURCES = ("decode", "prefill", "placement")
PICTURES = Path(__file__).resolve().parents[1] / "docs"
SKEWS = (0.0, 0.5, 1.0)
LEAN = "H200 (lean transport)"
SHOWN_ROWS = 64
# The network between CPU nodes, a round trip of 100 us and 10 Gb/s, comes on top of the software's cost over
# loopback.
CPU_ROUND_TRIP_S = 100e-6
CPU_BYTE_S = 8 / 10e9


def main(
    out: options.Out = options.RESULTS,
    pictures: Annotated[Path, typer.Option(help="The folder for the two pictures.")] = PICTURES,
    quick: options.Quick = False,
) -> None:
    """Fits, checks, forecasts; prints and writes scaling.json."""
    results = [Result.load(out / f"{name}.json") for name in SOURCES if (out / f"{name}.json").exists()]
    if not any(result.name == "decode" for result in results):
        raise SystemExit(f"{out}/decode.json is needed: run benchmarks/decode.py first")
    shape = model_shape(next(result.data["shape"] for result in results if result.name == "decode"))
    points = [point for result in results for point in read_points(result.data["points"])]
    points.sort(key=lambda point: (point.load.workers, point.load.rows))
    fit = fit_costs(shape, points)
    modelled = [
        step_time(shape, point.load, fit.node, slower(fit.node, point.threads_share), fit.costs)
        for point in points
    ]
    simulated = [
        simulate(shape, point.load, fit.node, slower(fit.node, point.threads_share), fit.costs)
        for point in points
    ]
    papers = [
        (kind, served := replace(model, weight_bytes=kind.weight_bytes), forecast(served, kind))
        for model in (MIXTRAL_8X7B, EIGHT_220B)
        for kind in kinds(fit)
    ]
    shown = {
        f"{model.name} on {kind.name} nodes": entry
        for kind, model, series in papers
        for entry in series
        if entry.rows == SHOWN_ROWS and kind.name != LEAN
    }
    draw_steps(pictures / "steps.png", points, modelled, simulated)
    draw_clusters(pictures / "clusters.png", shown)
    errors = [abs(step.total_s / point.total_s - 1) for step, point in zip(modelled, points, strict=True)]
    gaps = [abs(step.total_s / seconds - 1) for step, seconds in zip(modelled, simulated, strict=True)]
    conclude(
        "scaling",
        out,
        figures=[
            Figure(
                "model-error",
                "mean error of the model against the measured steps",
                100 * sum(errors) / len(errors),
                "%",
            ),
            Figure(
                "simulation-gap", "largest gap between the model and the simulation", 100 * max(gaps), "%"
            ),
        ],
        tables=[
            _fit_table(fit),
            Table(
                "Measured, modelled and simulated",
                ("workers, rows", "measured ms", "model ms", "simulated ms"),
                tuple(
                    (
                        point.name.replace("\n", ", "),
                        *(f"{1000 * seconds:,.1f}" for seconds in (point.total_s, step.total_s, seen)),
                    )
                    for point, step, seen in zip(points, modelled, simulated, strict=True)
                ),
            ),
            _skew_table(shape, fit),
            _memory_table([(kind, model) for kind, model, _ in papers if kind.name != LEAN]),
            *(
                _forecast_table(f"{model.name} on {kind.name} nodes", series)
                for kind, model, series in papers
            ),
        ],
        quick=quick,
    )


def model_shape(config: dict[str, Any]) -> ModelShape:
    """The shape of the measured checkpoint, with float32 weights and rows."""
    shape = Shape.of(config)
    return ModelShape(
        "measured",
        shape.layers,
        shape.hidden,
        shape.experts,
        shape.experts_per_token,
        expert_parameters(shape),
        router_parameters(shape),
        weight_bytes=4,
        row_bytes=4,
    )


def read_points(raw: Iterable[dict[str, Any]]) -> list[Point]:
    """The measured steps in fp32 over gRPC. Workers on one host share its cores."""
    cores = len(psutil.Process().cpu_affinity())
    return [
        Point(
            f"{entry['workers']}\n{entry['rows']:.0f}",
            Load(round(entry["rows"]), entry["workers"]),
            entry["router_s"],
            entry["compute_s"],
            entry["overhead_s"],
            threads_share=max(1, cores // entry["workers"]) / cores,
        )
        for entry in raw
        if entry["experts"] == "fp32" and "shared memory" not in entry.get("variant", "")
    ]


def slower(node: Node, share: float) -> Node:
    return Node(node.bandwidth * share, node.flops * share)


def kinds(fit: Fit) -> tuple[Kind, ...]:
    between = replace(fit.costs, round_trip_s=CPU_ROUND_TRIP_S, byte_s=fit.costs.byte_s + CPU_BYTE_S)
    return (
        Kind("CPU", fit.node, fit.node, between, weight_bytes=4),
        Kind("H200", H200, H200, H200_GRPC, weight_bytes=2, memory_bytes=H200_MEMORY_BYTES),
        Kind(LEAN, H200, H200, H200_LEAN, weight_bytes=2, memory_bytes=H200_MEMORY_BYTES),
    )


def _fit_table(fit: Fit) -> Table:
    costs = fit.costs
    rows = (
        ("expert weights read, GB/s", f"{fit.node.bandwidth / 1e9:,.1f}"),
        ("products, GFLOP/s", f"{fit.node.flops / 1e9:,.0f}"),
        ("router, us a layer", f"{1e6 * costs.router_layer_s:,.0f}"),
        ("router, us a row", f"{1e6 * costs.router_row_s:,.0f}"),
        ("a worker's pass, us", f"{1e6 * costs.pass_s:,.0f}"),
        ("a layer's call, us", f"{1e6 * costs.call_s:,.0f}"),
        ("each worker asked, us", f"{1e6 * costs.fan_out_s:,.0f}"),
        ("a MiB on the wire, us", f"{1e6 * costs.byte_s * (1 << 20):,.0f}"),
    )
    return Table("Costs fitted", ("cost", "value"), rows)


def _skew_table(shape: ModelShape, fit: Fit) -> Table:
    """Even and uneven load on one worker per expert, by model and simulation, with machines like this one."""
    rows = []
    for skew in SKEWS:
        for number in (1, 16, 64):
            load = Load(number, shape.experts, skew)
            arguments = (shape, load, fit.node, fit.node, fit.costs)
            rows.append(
                (
                    f"{number}, {skew:g}",
                    f"{1000 * step_time(*arguments).total_s:,.1f}",
                    f"{1000 * simulate(*arguments):,.1f}",
                )
            )
    return Table(
        f"{shape.experts} machines like this one, one expert of each layer on each",
        ("rows, skew (0 even, 1 Zipf)", "model ms", "simulated ms"),
        tuple(rows),
    )


def _memory_table(served: Sequence[tuple[Kind, ModelShape]]) -> Table:
    def held(size: float, kind: Kind) -> str:
        return f"{size / 1e9:,.1f}{' !' if kind.memory_bytes and size > kind.memory_bytes else ''}"

    return Table(
        "GB of weights a node (!: more than one node's memory)",
        ("model, nodes", "router", *(f"experts, {number} nodes" for number in NODES)),
        tuple(
            (
                f"{model.name}, {kind.name}",
                held(router_bytes(model), kind),
                *(held(experts_bytes(model, number), kind) for number in NODES),
            )
            for kind, model in served
        ),
    )


def _forecast_table(title: str, series: Sequence[Forecast]) -> Table:
    return Table(
        title,
        (
            "rows a step",
            "step ms",
            "router",
            "compute",
            "overhead",
            "tokens/s, one router",
            *(f"{number} busy nodes (routers)" for number in NODES),
        ),
        tuple(
            (
                str(entry.rows),
                *(
                    f"{1000 * seconds:,.1f}"
                    for seconds in (
                        entry.step.total_s,
                        entry.step.router_s,
                        entry.step.compute_s,
                        entry.step.overhead_s,
                    )
                ),
                _rate(entry.tokens_per_s),
                *(f"{_rate(full.tokens_per_s)} ({full.routers:,.0f})" for full in entry.by_nodes.values()),
            )
            for entry in series
        ),
    )


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 20 else f"{tokens_per_s:.2g}"


if __name__ == "__main__":
    typer.run(main)
