"""The activity of a cluster as tables for a terminal of 80 columns, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.styled import Styled
from rich.table import Table
from rich.text import Text

from cluster.cli.gate_summary import summarise_gates
from cluster.cli.parked_remark import tell_parked
from cluster.observation.activity import Activity, RouterActivity, WorkerActivity
from cluster.observation.observer import Observation
from cluster.terminal.tables import new_table, state_text
from moesaic.v1 import control_pb2


@dataclass(frozen=True, slots=True)
class Look:
    """An observation, and the activity since the one before. `lost`: why none is newer; empty otherwise."""

    target: str
    observation: Observation
    activity: Activity
    lost: str = ""


def plain_look(look: Look) -> dict[str, Any]:
    """JSON values. Rates are per second, shares from 0 to 1; a latency is null where no call was made."""
    activity, model = look.activity, look.observation.model
    gates = summarise_gates(look.observation.routers.values())
    return {
        "router": look.target,
        "model": model.model,
        "epoch": model.epoch,
        "seconds": activity.seconds,
        "prompt_tokens_per_s": activity.rate(activity.prompt_tokens),
        "generated_tokens_per_s": activity.rate(activity.generated_tokens),
        "prefix_hit_share": activity.prefix_hit_share,
        "routers": [_plain_router(activity, router) for router in activity.routers],
        "workers": [_plain_worker(activity, worker) for worker in activity.workers],
        "gates": None if gates is None else gates.plain(),
        "problem": look.observation.problem or None,
    }


def _plain_router(activity: Activity, router: RouterActivity) -> dict[str, Any]:
    return {
        "name": router.name,
        "address": router.address,
        "state": _state_name(router),
        "prompt_tokens_per_s": activity.rate(router.prompt_tokens),
        "generated_tokens_per_s": activity.rate(router.generated_tokens),
        "steps_per_s": activity.rate(router.steps),
        "running_sequences": router.running_sequences,
        "waiting_sequences": router.waiting_sequences,
        "parked_sequences": router.parked_sequences,
        "kv_blocks_used": router.kv_blocks_used,
        "kv_blocks_total": router.kv_blocks_total,
        "prefix_hit_share": router.prefix_hit_share,
        "preemptions": router.preemptions,
    }


def _plain_worker(activity: Activity, worker: WorkerActivity) -> dict[str, Any]:
    return {
        "name": worker.name,
        "address": worker.address,
        "state": _state_name(worker),
        "detail": worker.detail or None,
        "transports": worker.transports,
        "rows_per_s": activity.rate(worker.rows),
        "calls_per_s": activity.rate(worker.calls),
        "busy_share": activity.busy_share(worker),
        "call_p50_us": worker.call_p50_us or None,
        "call_p99_us": worker.call_p99_us or None,
        "failed_calls": worker.all_failed_calls,
        "hedged_calls": worker.hedged_calls,
        "circuits": worker.circuits,
    }


def draw_look(look: Look) -> RenderableType:
    """The look as text and tables."""
    activity, model = look.activity, look.observation.model
    heading = Text.assemble(
        (model.model, "bold"), f"  epoch {model.epoch}  router {look.target}", overflow="fold"
    )
    gates = summarise_gates(look.observation.routers.values())
    parts: list[RenderableType] = [heading, _totals(activity)]
    parts += [] if gates is None else [Text(str(gates))]
    parts += [Text(), _router_table(activity)]
    if activity.workers:
        parts += [Text(), _worker_table(activity)]
    parts += [Text(remark, style="yellow") for remark in _remarks(look)]
    if look.lost:
        return Group(Styled(Group(*parts), "dim"), Text(), Text(look.lost, style="bold red"))
    return Group(*parts)


def _totals(activity: Activity) -> Text:
    running = sum(router.running_sequences for router in activity.routers)
    waiting = sum(router.waiting_sequences for router in activity.routers)
    return Text.assemble(
        (f"{activity.rate(activity.generated_tokens):,.0f}", "bold green"),
        " tokens a second out, ",
        (f"{activity.rate(activity.prompt_tokens):,.0f}", "bold"),
        " in; ",
        (str(running), "bold"),
        " running, ",
        (str(waiting), "bold yellow" if waiting else "bold"),
        " waiting",
    )


def _router_table(activity: Activity) -> Table:
    table = new_table(
        *("router", "state", ">out/s", ">in/s", ">steps/s", ">running", ">waiting", ">KV", ">prefix hits"),
        drop=("prefix hits", "steps/s", "in/s", "waiting", "KV", "running"),
    )
    for router in activity.routers:
        used = router.kv_blocks_used / router.kv_blocks_total if router.kv_blocks_total else 0.0
        hits = router.prefix_hit_share
        table.add_row(
            router.name,
            _state(router),
            f"{activity.rate(router.generated_tokens):,.0f}",
            f"{activity.rate(router.prompt_tokens):,.0f}",
            f"{activity.rate(router.steps):,.0f}",
            str(router.running_sequences),
            str(router.waiting_sequences),
            f"{used:.0%}",
            "-" if hits is None else f"{hits:.0%}",
        )
    return table


def _worker_table(activity: Activity) -> Table:
    table = new_table(
        *("worker", "state", "via", ">rows/s", ">calls/s", ">busy", ">p50 ms", ">p99 ms", ">failed"),
        drop=("calls/s", "p50 ms", "via", "failed", "rows/s", "p99 ms"),
    )
    for worker in activity.workers:
        busy = min(1.0, activity.busy_share(worker))
        failed = str(worker.all_failed_calls)
        table.add_row(
            worker.name,
            "\n".join((_state(worker), *(f"[red]{circuit}[/]" for circuit in worker.circuits))),
            # One line for each word, because "shared_memory" would not fit into eighty columns.
            "\n".join(worker.transports).replace("_", "\n") or "-",
            f"{activity.rate(worker.rows):,.0f}",
            f"{activity.rate(worker.calls):,.0f}",
            f"{busy:.0%}",
            _milliseconds(worker.call_p50_us),
            _milliseconds(worker.call_p99_us),
            f"[bold red]{failed}[/]" if worker.failed_calls else failed,
        )
    return table


def _milliseconds(microseconds: int) -> str:
    return f"{microseconds / 1000:.2f}" if microseconds else "-"


def _state(process: RouterActivity | WorkerActivity) -> str:
    if not process.answers:
        return "[red]away[/]"
    if process.state == control_pb2.PROCESS_STATE_UNSPECIFIED:  # without a controller
        return "[green]up[/]"
    return state_text(process.state)


def _state_name(process: RouterActivity | WorkerActivity) -> str:
    return Text.from_markup(_state(process)).plain


def _remarks(look: Look) -> Iterable[str]:
    if look.observation.problem:
        yield look.observation.problem
    yield from tell_parked(look.observation.routers)
    for worker in look.activity.workers:
        if worker.detail:
            yield f"{worker.name}: {worker.detail}"
