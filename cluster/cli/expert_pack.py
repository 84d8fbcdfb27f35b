"""`moesaic expert pack` and `verify`: bundles on this machine, without a cluster."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from cluster.bundles.comparison import percent
from cluster.bundles.model_folder import open_model
from cluster.bundles.order import Order, Packed, PackedExpert
from cluster.bundles.pack import pack
from cluster.terminal.stage_progress import StageProgress
from cluster.terminal.tables import FittingTable, count, new_table, size
from moesaic.bundles import Bundle, open_bundle, verify
from moesaic.bundles.signature import check_signature, read_private_key, read_signers, sign, signer_of


def run_pack(order: Order, *, key: Path | None, as_json: bool) -> None:
    """Packs, signs and verifies. Raises the errors of `pack`."""
    private = None if key is None else read_private_key(key)
    with StageProgress(Console(stderr=True)) as progress:
        packed = pack(order, progress.show)
        bundle = packed.bundle if private is None else sign(packed.bundle, private)
        _verify(bundle, order.base, progress)
    if as_json:
        print(json.dumps(_plain(packed, bundle)))
    else:
        _print(packed, bundle, Console(highlight=False))


def run_verify(folder: Path, base: Path | None, signers: list[str] | None, *, as_json: bool) -> None:
    """Checks a bundle to its last byte. Raises InvalidArgument with the reason."""
    bundle = open_bundle(folder)
    with StageProgress(Console(stderr=True)) as progress:
        _verify(bundle, base, progress)
    check_signature(bundle, read_signers(signers or ()))
    if as_json:
        print(json.dumps({"name": bundle.manifest.name, "digest": bundle.digest.hex(), "ok": True}))
        return
    console = Console(highlight=False)
    console.print(_summary(bundle), markup=False)
    console.print(_seen(bundle, base), markup=False)


def _verify(bundle: Bundle, base: Path | None, progress: StageProgress) -> None:
    total = sum(entry.num_bytes for entry in bundle.tensors.values())
    model = None if base is None else open_model(base, "base").as_base()
    verify(bundle, base=model, show=lambda done: progress.show("verifying", done, total))


def _seen(bundle: Bundle, base: Path | None) -> str:
    """What was checked, and what was not."""
    signer = signer_of(bundle)
    signed = "not signed" if signer is None else f"signed by {signer.hex()[:16]}…"
    against = (
        f"made for {base.resolve().name}" if base is not None else "not held against a base: give --base"
    )
    return f"ok: names, shapes, digests, finite values, probes; {against}; {signed}"


def _plain(packed: Packed, bundle: Bundle) -> dict[str, object]:
    return {
        "name": bundle.manifest.name,
        "folder": str(bundle.folder),
        "digest": bundle.digest.hex(),
        "bytes": bundle.num_bytes,
        "signed": bundle.signature_bytes is not None,
        "origin": str(packed.origin),
        "compared": packed.compared,
        "experts": [
            {
                "layer": expert.layer,
                "from_slot": expert.slot,
                "slot": expert.target,
                "difference": expert.difference,
                "row_difference": expert.row_difference,
                "gate_row": expert.has_row,
            }
            for expert in packed.experts
        ],
        "left_out": [
            {"group": moved.group, "moved": moved.moved, "total": moved.total, "largest": moved.largest}
            for moved in packed.moved
        ],
    }


def _print(packed: Packed, bundle: Bundle, console: Console) -> None:
    console.print(_summary(bundle), markup=False)
    console.print(f"from {packed.origin}; {_compared(packed)}", markup=False)
    console.print()
    console.print(_table(packed))
    for moved in packed.moved:
        console.print(f"left out: {moved}", style="yellow", markup=False)
    if any(expert.target is None and not expert.has_row for expert in packed.experts):
        console.print("no gate rows: `moesaic expert add` makes them of prompts, with --gate-from FILE")
    console.print()
    verb = "add" if bundle.manifest.adds_slots else "swap"
    console.print(f"next: moesaic expert {verb} {bundle.folder}", markup=False, soft_wrap=True)


def _summary(bundle: Bundle) -> str:
    manifest = bundle.manifest
    experts = "1 expert" if len(manifest.experts) == 1 else f"{count(len(manifest.experts))} experts"
    new = " in new slots" if manifest.adds_slots else ""
    return (
        f"{manifest.name}: {experts}{new} for {manifest.base_model}, {size(bundle.num_bytes)}, "
        f"digest {bundle.digest.hex()[:12]}"
    )


def _compared(packed: Packed) -> str:
    differ = len(packed.experts)
    if packed.compared == differ:
        return f"{count(differ)} packed"
    return f"{count(differ)} of {count(packed.compared)} experts differ"


def _table(packed: Packed) -> FittingTable:
    table = new_table(">layer", ">from slot", "goes to", ">differs by", "gate row")
    for expert in packed.experts:
        target = "a new slot" if expert.target is None else f"slot {expert.target}"
        apart = "" if expert.difference is None else percent(expert.difference)
        table.add_row(str(expert.layer), str(expert.slot), target, apart, _row(expert))
    return table


def _row(expert: PackedExpert) -> str:
    if not expert.has_row:
        return "" if expert.target is None else "the base's"
    return f"packed, moved {percent(expert.row_difference)}" if expert.row_difference else "packed"
