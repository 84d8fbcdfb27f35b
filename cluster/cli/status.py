"""`moesaic status`: one router, its controller and the other routers of the cluster, as tables.

The router reports its traffic, the controller its processes. A router whose workers were named by hand has no
controller, so only its own view is shown.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from rich.console import Console
from rich.table import Table

from cluster.cli.gate_summary import summarise_gates
from cluster.cli.parked_remark import tell_parked
from cluster.observation.observer import Observation, Observer
from cluster.terminal.json_output import plain
from cluster.terminal.tables import count, new_table, state_text
from moesaic.v1 import control_pb2, inference_pb2

TIMEOUT_S = 5.0
# The circuit of a replica that is called like any other.
CLOSED = "closed"


async def run_status(target: str, *, as_json: bool) -> None:
    """Prints the state of a cluster. Raises MoesaicError when its router does not answer."""
    async with Observer(target, timeout_s=TIMEOUT_S) as observer:
        seen = await observer.observe_routers()
    if as_json:
        print(json.dumps(_plain(target, seen)))
    else:
        _print(target, seen, Console(highlight=False))


def _plain(target: str, seen: Observation) -> dict[str, object]:
    return {
        "router": target,
        "model": plain(seen.model),
        "stats": plain(seen.entry),
        "routers": {name: plain(stats) for name, stats in seen.routers.items()},
        "topology": plain(seen.topology) if seen.topology else None,
        "problem": _problem(seen) or None,
    }


def _print(target: str, seen: Observation, console: Console) -> None:
    model, stats = seen.model, seen.entry
    console.print(f"[bold]{model.model}[/] ({model.family}), epoch {model.epoch}, router {target}")
    console.print(
        f"{model.num_layers} layers{_experts(model)}; "
        f"context {model.max_model_len}; up {stats.uptime_s:.0f} s"
    )
    if len(seen.routers) <= 1:
        console.print(
            f"{stats.running_sequences} running, {stats.waiting_sequences} waiting; "
            f"KV {stats.kv_blocks_used} of {stats.kv_blocks_total} blocks; "
            f"{count(stats.generated_tokens)} tokens generated"
        )
    gates = summarise_gates(seen.routers.values())
    if gates is not None:
        console.print(str(gates))
    if refused := _refused(seen.routers.values()):
        console.print(refused)
    if seen.topology is not None:
        console.print()
        console.print(_processes(seen.topology, seen.routers))
    if stats.workers:
        console.print()
        console.print(_traffic(stats))
    if len(seen.routers) > 1:
        console.print()
        console.print(_routers(seen.routers))
    for remark in _remarks(seen):
        console.print(remark, style="yellow", markup=False)


def _experts(model: inference_pb2.GetModelInfoResponse) -> str:
    """The count of the layer that has most; empty where the router computes the whole model."""
    if not model.num_experts:
        return ""
    experts = "1 expert" if model.num_experts == 1 else f"{model.num_experts} experts"
    return f" of {experts}, {model.num_experts_per_token} a token"


def _processes(
    topology: control_pb2.GetTopologyResponse,
    routers: Mapping[str, inference_pb2.GetRouterStatsResponse],
) -> Table:
    rows = Counter[str]()  # by address: a name may be that of an earlier start as well
    for stats in routers.values():
        for traffic in stats.workers:
            rows[traffic.address] += traffic.rows
    table = new_table(
        *("process", "state", "address", ">pid", ">experts", ">rows", ">restarts"),
        drop=("pid", "experts", "rows", "restarts"),
    )
    for process in topology.processes:
        table.add_row(
            process.name,
            state_text(process.state),
            process.address,
            str(process.pid or ""),
            str(len(process.experts) or ""),
            count(rows[process.address]) if process.address in rows else "",
            str(process.restarts),
        )
    return table


def _routers(routers: Mapping[str, inference_pb2.GetRouterStatsResponse]) -> Table:
    table = new_table(
        *("router", ">running", ">waiting", ">KV blocks", ">tokens generated"),
        drop=("tokens generated", "KV blocks"),
    )
    for name, stats in routers.items():
        table.add_row(
            name,
            count(stats.running_sequences),
            count(stats.waiting_sequences),
            f"{stats.kv_blocks_used} of {stats.kv_blocks_total}",
            count(stats.generated_tokens),
        )
    return table


def _refused(routers: Iterable[inference_pb2.GetRouterStatsResponse]) -> str:
    """How many sequences all routers have refused since they started, and why."""
    total: Counter[str] = Counter()
    for stats in routers:
        total.update(stats.refusals)
    reasons = ", ".join(f"{count(times)} {reason}" for reason, times in total.most_common())
    return f"refused: {reasons}" if reasons else ""


def _remarks(seen: Observation) -> list[str]:
    processes = seen.topology.processes if seen.topology is not None else ()
    details = [f"{process.name}: {process.detail}" for process in processes if process.detail]
    problems = filter(None, (_problem(seen), _unheld(seen.entry)))
    return [*problems, *tell_parked(seen.routers), *details, *_troubles(seen)]


def _troubles(seen: Observation) -> Iterator[str]:
    """Why routers do not call a replica like any other."""
    for name, stats in seen.routers.items():
        for traffic in stats.workers:
            if traffic.circuit not in ("", CLOSED):
                yield f"{traffic.worker} is {traffic.circuit} at {name}: {traffic.last_error or 'it was late'}"


def _unheld(stats: inference_pb2.GetRouterStatsResponse) -> str:
    """How many experts no worker can compute now; empty when there is none."""
    unheld = stats.experts_without_worker
    return f"{unheld} of {stats.experts} experts have no worker" if unheld else ""


def _problem(seen: Observation) -> str:
    return f"{seen.problem}: only the router's view is shown" if seen.problem else ""


def _traffic(stats: inference_pb2.GetRouterStatsResponse) -> Table:
    """The replicas as the router sees them."""
    table = new_table(
        *(
            "worker",
            "circuit",
            "address",
            ">calls",
            ">rows",
            ">in flight",
            ">p50 ms",
            ">p99 ms",
            ">failed",
            ">late",
        ),
        drop=("in flight", "p50 ms", "calls", "rows", "p99 ms", "late", "failed"),
    )
    for traffic in stats.workers:
        table.add_row(
            traffic.worker,
            _circuit(traffic),
            traffic.address,
            count(traffic.calls),
            count(traffic.rows),
            count(traffic.in_flight),
            f"{traffic.call_p50_us / 1000:.2f}",
            f"{traffic.call_p99_us / 1000:.2f}",
            count(traffic.failed_calls),
            count(traffic.hedged_calls),
        )
    return table


def _circuit(traffic: inference_pb2.WorkerTraffic) -> str:
    if traffic.circuit != CLOSED:
        return f"[red]{traffic.circuit or '-'}[/]"
    return traffic.circuit if traffic.connected else "[red]away[/]"
