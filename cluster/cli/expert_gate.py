"""Gate rows that `moesaic expert add` makes on the spot: shown, and gone on with only if that is wanted."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console

from cluster.bundles.row_maker import MadeRows, RowOrder, make_rows
from cluster.cli.expert_change import Reach, run_bundle_change
from cluster.terminal.tables import count, new_table
from moesaic.bundles import Bundle
from moesaic.errors import Cancelled, InvalidArgument
from moesaic.v1 import inference_pb2

# Above it the rows of a layer are so much alike that the gate can hardly tell them apart; mergekit warns there, too.
MAX_CONDITION = 5.0


async def run_add_with_rows(
    bundle: Bundle | str,
    order: RowOrder,
    reach: Reach,
    *,
    expected_epoch: str,
    yes: bool,
    as_json: bool,
    ask: Callable[[str], str] = input,
) -> None:
    """Makes the rows, shows what they would do, and adds the experts. Raises Cancelled if that is not wanted."""
    if isinstance(bundle, str):
        raise InvalidArgument(
            "bundle: rows are made for a bundle in a folder here, and there is none", field="bundle"
        )
    made = await make_rows(bundle, order, reach.router)
    _show(made, order, Console(stderr=True, highlight=False))
    if not yes:
        _confirm(ask)
    await run_bundle_change(
        bundle,
        reach,
        verb="add",
        expected_epoch=expected_epoch,
        gate_rows=made.to_proto(),
        facts={"gate_rows": _plain(made, order)},
        as_json=as_json,
    )


def _confirm(ask: Callable[[str], str]) -> None:
    if not sys.stdin.isatty():
        raise InvalidArgument("yes: is needed where nobody can be asked: give --yes", field="yes")
    if ask("add it with these rows? [y/N] ").strip().lower() not in ("y", "yes"):
        raise Cancelled("not added; nothing was changed")


def _show(made: MadeRows, order: RowOrder, console: Console) -> None:
    if made.measured is None or order.prompts is None:
        console.print(f"{len(made.rows)} gate rows, {order.mode}; not measured: give --gate-from FILE")
        return
    prompts = f"{count(len(order.prompts.used))} prompts"
    held_out = f"{count(len(order.prompts.held_out))} held out"
    if order.prompts.used == order.prompts.held_out:
        held_out = "measured by the very same"
    console.print(f"{len(made.rows)} gate rows, {order.mode}, of {prompts}; {held_out}")
    console.print()
    table = new_table(">layer", ">tokens", ">take it", ">condition")
    for layer in made.measured.layers:
        table.add_row(
            str(layer.layer), count(layer.tokens), f"{_share(layer):.0%}", f"{layer.condition_number:.1f}"
        )
    console.print(table)
    for remark in _remarks(made.measured):
        console.print(remark, style="yellow", markup=False)


def _remarks(measured: inference_pb2.MeasureGateRowsResponse) -> list[str]:
    remarks = []
    if alike := [layer.layer for layer in measured.layers if layer.condition_number > MAX_CONDITION]:
        remarks.append(f"in {len(alike)} layers the rows are nearly alike: condition above {MAX_CONDITION:g}")
    if unused := [layer.layer for layer in measured.layers if not layer.taken]:
        remarks.append(
            f"in {len(unused)} layers no held-out token takes the new slot: a --gate-temperature below 1 helps"
        )
    return remarks


def _plain(made: MadeRows, order: RowOrder) -> dict[str, object]:
    layers = [] if made.measured is None else made.measured.layers
    return {
        "mode": order.mode,
        "rows": len(made.rows),
        "layers": [
            {
                "layer": layer.layer,
                "tokens": layer.tokens,
                "share": round(_share(layer), 4),
                "condition_number": layer.condition_number,
            }
            for layer in layers
        ],
    }


def _share(layer: inference_pb2.LayerShare) -> float:
    return layer.taken / layer.tokens if layer.tokens else 0.0
