"""`moesaic expert list | show | history`: what the controller has and did."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime

from rich.console import Console

from cluster.bundles.controller_client import controller_client
from cluster.cli.expert_change import Reach, find_bundle
from cluster.terminal.json_output import plain
from cluster.terminal.tables import new_table, size
from moesaic.bundles import BundleExpert, Manifest
from moesaic.v1 import common_pb2, control_pb2

_ID_CHARS = 12
_DIGEST_CHARS = 64
# The narrowest column of reasons, and what the columns beside it take.
_LEAST_WHY_CHARS = 24
_OTHER_CHARS = 90


async def run_list(reach: Reach, *, as_json: bool) -> None:
    async with controller_client(await reach.address()) as client:
        bundles = await client.bundles()
    if as_json:
        print(json.dumps({"bundles": [_brief(bundle) for bundle in bundles]}))
        return
    console = Console(highlight=False)
    if not bundles:
        console.print("no bundles: `moesaic expert pack` makes one, `add` and `swap` bring it here")
        return
    table = new_table("bundle", "digest", ">size", "in use", "tags", drop=("tags", "digest", "size"))
    for bundle in bundles:
        digest = bundle.digest.hex()[:_ID_CHARS]
        table.add_row(bundle.name, digest, size(bundle.num_bytes), _use(bundle), ", ".join(bundle.tags))
    console.print(table)
    console.print(f"{size(sum(bundle.num_bytes for bundle in bundles))} in all")


async def run_show(name: str, reach: Reach, *, as_json: bool) -> None:
    """Raises NotFound for a bundle that the controller does not have."""
    async with controller_client(await reach.address()) as client:
        stored = await find_bundle(name, client)
    if as_json:
        print(json.dumps(_plain(stored)))
    else:
        _show(stored, Manifest.from_json(stored.manifest), Console(highlight=False))


async def run_history(reach: Reach, *, limit: int, as_json: bool) -> None:
    async with controller_client(await reach.address()) as client:
        history = await client.history(limit)
    if as_json:
        print(json.dumps(plain(history)))
    else:
        _print_history(history, Console(highlight=False))


def _brief(stored: control_pb2.StoredBundle) -> dict[str, object]:
    return {name: value for name, value in plain(stored).items() if name != "manifest"}


def _plain(stored: control_pb2.StoredBundle) -> dict[str, object]:
    return {**_brief(stored), "manifest": json.loads(stored.manifest)}


def _show(stored: control_pb2.StoredBundle, manifest: Manifest, console: Console) -> None:
    facts = {
        "bundle": f"{manifest.name}, {size(stored.num_bytes)}",
        "digest": stored.digest.hex(),
        "for": manifest.base_model,
        "in use": _use(stored),
        "about": manifest.description,
        "owner": manifest.owner,
        "licence": manifest.licence,
        "tags": ", ".join(manifest.tags),
        **manifest.origin,
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        if value:
            console.print(f"{name.replace('_', ' '):{width}}  {value}", markup=False)
    console.print()
    table = new_table(">layer", "slot", "kind", "version", "gate row", drop=("kind",))
    for expert in manifest.experts:
        slot = "new" if expert.slot is None else str(expert.slot)
        table.add_row(str(expert.layer), slot, expert.kind, expert.version[:_ID_CHARS], _row(expert))
    console.print(table)


def _row(expert: BundleExpert) -> str:
    row = expert.gate_row
    if row is None:
        return ""
    return f"norm {row.norm}" + (f", temperature {row.temperature:g}" if row.temperature != 1 else "")


def _print_history(history: control_pb2.GetHistoryResponse, console: Console) -> None:
    console.print(f"epoch {history.epoch}" + (f", canary {history.canary}" if history.canary else ""))
    if history.canary_figures:
        console.print(f"canary so far: {history.canary_figures}", markup=False)
    if not history.entries:
        return
    console.print()
    table = new_table(*("when", "what", "epoch", "before", "by", "why"), drop=("by", "before", "when"))
    why = table.columns[-1]
    why.no_wrap, why.max_width = False, max(_LEAST_WHY_CHARS, console.width - _OTHER_CHARS)
    for entry in history.entries:
        when = datetime.fromtimestamp(entry.time).strftime("%m-%d %H:%M:%S")
        what = f"{entry.what} {_short(entry.bundle)}".rstrip()
        table.add_row(when, what, entry.epoch, entry.previous_epoch, entry.operator, entry.detail)
    console.print(table)


def _short(bundle: str) -> str:
    """A name as it is, a digest by its beginning."""
    return bundle[:_ID_CHARS] if len(bundle) == _DIGEST_CHARS else bundle


def _use(stored: control_pb2.StoredBundle) -> str:
    """Where a bundle is in use, or which other epoch needs it; places that it has in a canary alone say so."""
    if stored.experts:
        return _places(stored.experts)
    if stored.canary_experts:
        return f"canary, {_places(stored.canary_experts)}"
    return f"epoch {stored.needed_by}" if stored.needed_by else ""


def _places(experts: Iterable[common_pb2.ExpertAddress]) -> str:
    """(0, 8), (1, 8), (2, 8) -> layers 0-2: slot 8."""
    by_slot: dict[int, list[int]] = {}
    for expert in experts:
        by_slot.setdefault(expert.slot, []).append(expert.layer)
    return "; ".join(
        f"{'layer' if len(layers) == 1 else 'layers'} {_ranges(layers)}: slot {slot}"
        for slot, layers in sorted(by_slot.items())
    )


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 -> 0-2,5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
