"""`moesaic demo-experts`: experts join the built-in model while it answers, are made better, refused, and taken away.

After each step the model reads the same texts and is asked the same sums. What refuses the new experts, and what is
left when they are gone, must be the model of before to the last bit.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

from cluster.bundles.controller_client import ControllerClient, controller_client, find_controller
from cluster.bundles.demo_bundles import BETTER, BUNDLES, FIRST
from cluster.cli.expert_change import operator_name
from cluster.cli.reading import SUMS, Reading, load_texts, read
from cluster.cli.router_client import router_client
from cluster.launch.milestones import Milestones
from cluster.launch.ports import with_ports
from cluster.launch.serve import check_model, running_cluster
from cluster.terminal.load_progress import LoadProgress
from cluster.terminal.tables import new_table
from moesaic import Client, Deny
from moesaic.bundles import open_bundle
from moesaic.errors import DataLoss
from moesaic.expert_policy import ExpertPolicy
from moesaic.settings import Settings
from moesaic.stop_signals import StopSignals
from moesaic.v1 import control_pb2

# The sum that has a column of its own.
SHOWN = "12 + 7 ="


@dataclass(frozen=True, slots=True)
class Step:
    """The model after one step. `seconds`: from the command until every router had the new epoch; None without a change.
    `equal_to_before`: None where it is not meant to be."""

    name: str
    reading: Reading
    seconds: float | None = None
    equal_to_before: bool | None = None


async def run_demo_experts(settings: Settings, *, as_json: bool) -> None:
    """Raises Unavailable when the cluster cannot start, and DataLoss when what should be as before is not."""
    model, settings = check_model(settings), with_ports(settings)
    out = Console(file=sys.stdout, highlight=False, quiet=as_json)
    _print_opening(out)
    steps: list[Step] = []
    with StopSignals() as signals:
        progress = LoadProgress(Console(stderr=True, quiet=as_json))
        async with running_cluster(settings, model, progress, Milestones(), signals) as endpoints:
            await signals.unless_stopped(_play(endpoints.grpc, steps, out))
    if as_json:
        print(json.dumps(_as_json(steps)))
    else:
        _print_closing(out, steps)
    if any(step.equal_to_before is False for step in steps):
        raise DataLoss("the model is not what it was before", reason="NUMBERS_DIFFER")


async def _play(router: str, steps: list[Step], out: Console) -> None:
    """Appends the steps, and shows each at once."""
    with Live(
        _table(steps), console=out, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    ) as live:
        async with (
            router_client(router) as client,
            controller_client(await find_controller(router)) as controller,
        ):
            async for step in _steps(client, controller):
                steps.append(step)
                live.update(_table(steps), refresh=True)
    if not out.is_terminal:
        out.line()  # a terminal gets it from the table


async def _steps(client: Client, controller: ControllerClient) -> AsyncIterator[Step]:
    texts, everything = load_texts(), ExpertPolicy()
    before = await read(client, texts, everything)
    yield Step("before", before)
    seconds = await _bring(controller, FIRST, control_pb2.CHANGE_KIND_ADD)
    yield Step(f"add {FIRST}", await read(client, texts, everything), seconds)
    seconds = await _bring(controller, BETTER, control_pb2.CHANGE_KIND_SWAP)
    yield Step(f"swap in {BETTER}", await read(client, texts, everything), seconds)
    denied = await read(client, texts, Deny(BETTER))
    yield Step(f"deny {BETTER}", denied, equal_to_before=denied == before)
    removal = control_pb2.ChangeRequest(kind=control_pb2.CHANGE_KIND_REMOVE, name=BETTER)
    seconds = await _change(controller, removal)
    after = await read(client, texts, everything)
    yield Step(f"remove {BETTER}", after, seconds, after == before)


async def _bring(controller: ControllerClient, name: str, kind: control_pb2.ChangeKind) -> float:
    """The seconds that it took, with the upload."""
    start_s = time.monotonic()
    bundle = open_bundle(BUNDLES / name)
    await controller.upload(bundle)
    await _change(controller, control_pb2.ChangeRequest(kind=kind, bundle=bundle.digest))
    return time.monotonic() - start_s


async def _change(controller: ControllerClient, request: control_pb2.ChangeRequest) -> float:
    """The seconds until every router has it."""
    request.operator = operator_name()
    return (await controller.carry_out(request)).spread_s


def _as_json(steps: list[Step]) -> Mapping[str, object]:
    return {
        "steps": [
            {
                "step": step.name,
                "perplexity": step.reading.perplexity,
                "answers": step.reading.answers,
                "sums_right": step.reading.num_right,
                "sums": len(SUMS),
                "seconds": step.seconds,
                "equal_to_before": step.equal_to_before,
            }
            for step in steps
        ]
    }


def _print_opening(out: Console) -> None:
    out.print(
        "[bold]Moesaic[/]: a new expert joins each layer of a model that never learned to reckon, is made better, "
        f"refused, and taken away. After each step: the perplexity of held-out texts (lower is better), and {len(SUMS)} "
        "sums.\n"
    )


def _table(steps: list[Step]) -> Table:
    names = list(load_texts())
    table = new_table("", *(f">{name}" for name in names), SHOWN, ">right", ">took")
    for step in steps:
        table.add_row(step.name, *_cells(step, names))
    return table


def _cells(step: Step, names: list[str]) -> Iterator[str]:
    perplexity = step.reading.perplexity
    yield from (f"{perplexity[name]:.2f}" for name in names)
    answer = step.reading.answers[SHOWN]
    yield f"[{'bold green' if answer == SUMS[SHOWN] else 'red'}]{answer}[/]"
    yield f"{step.reading.num_right}/{len(SUMS)}"
    yield "" if step.seconds is None else f"{step.seconds:.2f} s"


def _print_closing(out: Console, steps: list[Step]) -> None:
    before, better = steps[0].reading.answers[SHOWN], steps[2].reading.answers[SHOWN]
    out.print(f"\n{SHOWN} [red]{before}[/] before, [bold green]{better}[/] with {BETTER}")
    for step in steps:
        if step.equal_to_before is not None:
            verdict = (
                "[bold green]as before to the last bit[/]"
                if step.equal_to_before
                else "[bold red]not as before[/]"
            )
            out.print(f"{step.name}: {verdict}")
