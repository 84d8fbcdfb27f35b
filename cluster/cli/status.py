"""`moesaic status`: one router, the controller that it follows and the routers beside it, as tables.

A router knows its traffic, the controller the processes; a router whose workers were named by hand has no controller,
and then its own view of them is all there is.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import grpc
from rich.console import Console
from rich.table import Table

from cluster.cli.gate_summary import summarise_gates
from cluster.cli.router_client import router_client
from cluster.terminal.json_output import plain
from cluster.terminal.tables import count, new_table, state_text
from moesaic import Client, rpc
from moesaic.errors import MoesaicError
from moesaic.v1 import control_pb2, control_pb2_grpc, inference_pb2

TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """What routers and controller say of themselves. `topology`: None without a controller that answers."""

    router: str
    model: inference_pb2.GetModelInfoResponse
    stats: inference_pb2.GetRouterStatsResponse
    topology: control_pb2.GetTopologyResponse | None
    problem: str
    # Of all routers of the cluster, by name; one that does not answer is left out.
    routers: Mapping[str, inference_pb2.GetRouterStatsResponse]


async def run_status(target: str, *, as_json: bool) -> None:
    """Prints the state of a cluster. Raises MoesaicError when its router does not answer."""
    status = await ask_status(target)
    if as_json:
        print(json.dumps(_plain(status)))
    else:
        _print(status, Console(highlight=False))


async def ask_status(target: str) -> ClusterStatus:
    async with router_client(target) as client:
        model = await client.model_info(timeout_s=TIMEOUT_S)
        stats = await client.router_stats(timeout_s=TIMEOUT_S)
    if not model.control_address:
        return ClusterStatus(target, model, stats, None, "", {"router": stats})
    try:
        topology = await ask_topology(model.control_address)
    except grpc.aio.AioRpcError:
        problem = (
            f"the controller at {model.control_address} does not answer: only the router's view is shown"
        )
        return ClusterStatus(target, model, stats, None, problem, {"router": stats})
    return ClusterStatus(target, model, stats, topology, "", await _ask_routers(topology))


async def ask_topology(control_address: str) -> control_pb2.GetTopologyResponse:
    """The controller's view of the cluster. Raises AioRpcError."""
    async with rpc.aio_channel(control_address) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        answer: control_pb2.GetTopologyResponse = await stub.GetTopology(
            control_pb2.GetTopologyRequest(), timeout=TIMEOUT_S
        )
        return answer


async def _ask_routers(
    topology: control_pb2.GetTopologyResponse,
) -> dict[str, inference_pb2.GetRouterStatsResponse]:
    routers = [it for it in topology.processes if it.role == control_pb2.PROCESS_ROLE_ROUTER and it.address]
    answers = await asyncio.gather(*(_ask_router(router.address) for router in routers))
    return {router.name: stats for router, stats in zip(routers, answers, strict=True) if stats is not None}


async def _ask_router(address: str) -> inference_pb2.GetRouterStatsResponse | None:
    """None when it does not answer: the controller's view says why."""
    try:
        async with Client(address) as client:
            return await client.router_stats(timeout_s=TIMEOUT_S)
    except MoesaicError:
        return None


def _plain(status: ClusterStatus) -> dict[str, object]:
    return {
        "router": status.router,
        "model": plain(status.model),
        "stats": plain(status.stats),
        "routers": {name: plain(stats) for name, stats in status.routers.items()},
        "topology": plain(status.topology) if status.topology else None,
        "problem": status.problem or None,
    }


def _print(status: ClusterStatus, console: Console) -> None:
    model, stats = status.model, status.stats
    console.print(f"[bold]{model.model}[/] ({model.family}), epoch {model.epoch}, router {status.router}")
    console.print(
        f"{model.num_layers} layers{_experts(model)}; "
        f"context {model.max_model_len}; up {stats.uptime_s:.0f} s"
    )
    if len(status.routers) <= 1:
        console.print(
            f"{stats.running_sequences} running, {stats.waiting_sequences} waiting; "
            f"KV {stats.kv_blocks_used} of {stats.kv_blocks_total} blocks; "
            f"{count(stats.generated_tokens)} tokens generated"
        )
    gates = summarise_gates(status.routers.values())
    if gates is not None:
        console.print(str(gates))
    if status.topology is not None:
        console.print()
        console.print(_processes(status.topology, status.routers))
    elif stats.workers:
        console.print()
        console.print(_traffic(stats))
    if len(status.routers) > 1:
        console.print()
        console.print(_routers(status.routers))
    for remark in _remarks(status):
        console.print(remark, style="yellow", markup=False)


def _experts(model: inference_pb2.GetModelInfoResponse) -> str:
    """Of the layer that has most; none where the router computes the whole model."""
    if not model.num_experts:
        return ""
    experts = "1 expert" if model.num_experts == 1 else f"{model.num_experts} experts"
    return f" of {experts}, {model.num_experts_per_token} a token"


def _processes(
    topology: control_pb2.GetTopologyResponse,
    routers: Mapping[str, inference_pb2.GetRouterStatsResponse],
) -> Table:
    rows = Counter[str]()
    for stats in routers.values():
        rows.update({traffic.worker: traffic.rows for traffic in stats.workers})
    table = new_table("process", "state", "address", ">experts", ">rows", ">restarts")
    for process in topology.processes:
        table.add_row(
            process.name,
            state_text(process.state),
            process.address,
            str(len(process.experts) or ""),
            count(rows[process.name]) if process.name in rows else "",
            str(process.restarts),
        )
    return table


def _routers(routers: Mapping[str, inference_pb2.GetRouterStatsResponse]) -> Table:
    table = new_table("router", ">running", ">waiting", ">KV blocks", ">tokens generated")
    for name, stats in routers.items():
        table.add_row(
            name,
            count(stats.running_sequences),
            count(stats.waiting_sequences),
            f"{stats.kv_blocks_used} of {stats.kv_blocks_total}",
            count(stats.generated_tokens),
        )
    return table


def _remarks(status: ClusterStatus) -> list[str]:
    processes = status.topology.processes if status.topology is not None else ()
    details = [f"{process.name}: {process.detail}" for process in processes if process.detail]
    return [status.problem, *details] if status.problem else details


def _traffic(stats: inference_pb2.GetRouterStatsResponse) -> Table:
    table = new_table("worker", "connected", "address", ">calls", ">rows", ">failed")
    for traffic in stats.workers:
        connected = "yes" if traffic.connected else "[red]no[/]"
        table.add_row(
            traffic.worker,
            connected,
            traffic.address,
            count(traffic.calls),
            count(traffic.rows),
            count(traffic.failed_calls),
        )
    return table
