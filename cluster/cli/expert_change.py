"""`moesaic expert swap | canary | promote | rollback | add | remove`: changes of the model while it answers."""

from __future__ import annotations

import getpass
import json
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from cluster.bundles.controller_client import ControllerClient, controller_client, find_controller
from cluster.terminal.stage_progress import StageProgress
from cluster.terminal.tables import size
from moesaic.addresses import join_address, split_address
from moesaic.bundles import Bundle, Manifest, open_bundle
from moesaic.errors import Aborted, InvalidArgument, NotFound
from moesaic.v1 import common_pb2, control_pb2

# How the steps of a change read to a person.
_STAGES = {
    control_pb2.CHANGE_STAGE_VERIFY: "verify",
    control_pb2.CHANGE_STAGE_LOAD: "load beside",
    control_pb2.CHANGE_STAGE_PROBE: "probe",
    control_pb2.CHANGE_STAGE_PUBLISH: "publish",
    control_pb2.CHANGE_STAGE_COMMIT: "commit",
    control_pb2.CHANGE_STAGE_SPREAD: "every router",
    control_pb2.CHANGE_STAGE_DRAIN: "drain",
    control_pb2.CHANGE_STAGE_UNLOAD: "unload",
    control_pb2.CHANGE_STAGE_DONE: "done",
}
_UPLOAD = "upload"
# The shortest beginning of a digest that names a bundle.
_LEAST_DIGITS = 6

Verb = Literal["swap", "add", "canary"]


@dataclass(frozen=True, slots=True)
class Reach:
    """Where the controller is: its own address, or a router that follows it."""

    router: str
    controller: str | None = None

    async def address(self) -> str:
        """HOST:PORT. Raises InvalidArgument with field `controller`, or what `find_controller` raises."""
        if self.controller is None:
            return await find_controller(self.router)
        return join_address(*split_address(self.controller, "controller"))


@dataclass(frozen=True, slots=True)
class StoredOrNew:
    """A bundle that the controller has, as it is named in a change."""

    digest: bytes
    manifest: Manifest


def parse_share(text: str, field: str) -> float:
    """`10%` or `0.1` -> 0.1. Raises InvalidArgument with this field."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise InvalidArgument(f"{field}: must be a share, such as 10% or 0.1", field=field)
    return share


def open_here(bundle: str, verb: Verb) -> Bundle | str:
    """The bundle in a folder, or the name as it is if there is no such folder. Refuses one of the other kind."""
    folder = Path(bundle)
    if not folder.exists():
        return bundle
    opened = open_bundle(folder)
    _check_verb(opened.manifest, verb)
    return opened


async def run_bundle_change(
    bundle: Bundle | str,
    reach: Reach,
    *,
    verb: Verb,
    expected_epoch: str = "",
    share: float | None = None,
    shadow: float = 0.0,
    gate_rows: Sequence[common_pb2.GateRow] = (),
    facts: Mapping[str, object] | None = None,
    as_json: bool,
) -> None:
    """Swaps, adds, or tries on a `share` of requests. A text is the name or the digest of a stored bundle.

    `facts` belong to the JSON."""
    async with controller_client(await reach.address()) as client:
        with StageProgress(Console(stderr=True)) as progress:
            stored = await _provide(bundle, client, progress)
            _check_verb(stored.manifest, verb)
            request = control_pb2.ChangeRequest(
                kind=_kind(stored.manifest),
                bundle=stored.digest,
                expected_epoch=expected_epoch,
                canary=share is not None,
                share=share or 0.0,
                shadow_share=shadow,
                gate_rows=gate_rows,
                operator=operator_name(),
            )
            changed = await _follow(client, request, progress)
    _report(changed, stored.manifest.name, share=share, facts=facts or {}, as_json=as_json)


async def run_change(request: control_pb2.ChangeRequest, reach: Reach, *, as_json: bool) -> None:
    """A change without a bundle: remove, promote, rollback."""
    request.operator = operator_name()
    async with controller_client(await reach.address()) as client:
        with StageProgress(Console(stderr=True)) as progress:
            changed = await _follow(client, request, progress)
    _report(changed, request.name, share=None, facts={}, as_json=as_json)


def operator_name() -> str:
    """Who asks, for the history."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a user id without a name, as in many containers
        user = "somebody"
    return f"{user}@{socket.gethostname()}"


@dataclass(frozen=True, slots=True)
class _Changed:
    """What came of a change."""

    epoch: str
    previous: str
    detail: str
    # Each stage with its last sentence.
    stages: dict[str, str]
    seconds: float


async def _provide(bundle: Bundle | str, client: ControllerClient, progress: StageProgress) -> StoredOrNew:
    """Uploads a bundle, unless the controller has it, or finds a stored one."""
    if isinstance(bundle, str):
        return await _find_stored(bundle, client)

    def show(done: int, total: int) -> None:
        progress.show(_UPLOAD, done, total, f"{size(done)} of {size(total)}")

    progress.show(_UPLOAD, 0, 0, f"{bundle.manifest.name}, {size(bundle.num_bytes)}")
    if (await client.upload(bundle, show)).known:
        progress.show(_UPLOAD, 1, 1, "the controller has it")
    return StoredOrNew(bundle.digest, bundle.manifest)


def _check_verb(manifest: Manifest, verb: Verb) -> None:
    if verb == "swap" and manifest.adds_slots:
        raise InvalidArgument(
            f"bundle: {manifest.name} has new slots: `moesaic expert add` adds them", field="bundle"
        )
    if verb == "add" and not manifest.adds_slots:
        raise InvalidArgument(
            f"bundle: {manifest.name} replaces slots of the model: `moesaic expert swap` does that",
            field="bundle",
        )


async def _find_stored(wanted: str, client: ControllerClient) -> StoredOrNew:
    stored = await find_bundle(wanted, client)
    return StoredOrNew(stored.digest, Manifest.from_json(stored.manifest))


async def find_bundle(wanted: str, client: ControllerClient) -> control_pb2.StoredBundle:
    """By name, or by the beginning of its digest. Raises NotFound or InvalidArgument with field `bundle`."""
    stored = await client.bundles()
    found = [one for one in stored if one.name == wanted] or [
        one for one in stored if len(wanted) >= _LEAST_DIGITS and one.digest.hex().startswith(wanted)
    ]
    if not found:
        names = ", ".join(sorted({one.name for one in stored})) or "none"
        raise NotFound(
            f"bundle: there is no such folder here, and no such bundle at the controller; it has: {names}",
            field="bundle",
        )
    if len(found) > 1:
        digests = ", ".join(one.digest.hex()[:12] for one in found)
        raise InvalidArgument(
            f"bundle: several have this name, name one by its digest: {digests}", field="bundle"
        )
    return found[0]


def _kind(manifest: Manifest) -> control_pb2.ChangeKind:
    return control_pb2.CHANGE_KIND_ADD if manifest.adds_slots else control_pb2.CHANGE_KIND_SWAP


async def _follow(
    client: ControllerClient, request: control_pb2.ChangeRequest, progress: StageProgress
) -> _Changed:
    epoch, previous, detail, stages, begin = "", "", "", dict[str, str](), time.monotonic()
    async for step in client.change(request):
        stage = _STAGES.get(step.stage, "")
        epoch, previous = step.epoch or epoch, step.previous_epoch or previous
        detail = step.detail or detail
        if stage and step.stage != control_pb2.CHANGE_STAGE_DONE:
            stages[stage] = step.detail
            progress.show(stage, step.done, step.total, step.detail)
    if not epoch:
        raise Aborted("the controller ended the change without committing it: see `moesaic expert history`")
    return _Changed(epoch, previous, detail, stages, time.monotonic() - begin)


def _report(
    changed: _Changed, name: str, *, share: float | None, facts: Mapping[str, object], as_json: bool
) -> None:
    if as_json:
        values = {
            "bundle": name,
            "epoch": changed.epoch,
            "previous_epoch": changed.previous,
            "canary": share is not None,
            "detail": changed.detail,
            "stages": changed.stages,
            "seconds": round(changed.seconds, 3),
            **facts,
        }
        print(json.dumps(values))
        return
    console = Console(highlight=False, soft_wrap=True)
    for line in _lines(changed, share=share):
        console.print(line, markup=False)


def _lines(changed: _Changed, *, share: float | None) -> list[str]:
    took = f"{changed.seconds:.1f} s"
    if share is not None:
        return [
            f"canary: epoch {changed.epoch} for {share:.0%} of requests, beside {changed.previous}; {took}",
            "then: moesaic expert promote",
            "back: moesaic expert rollback",
        ]
    if not changed.previous or changed.previous == changed.epoch:
        return [f"epoch {changed.epoch}; {took}"]
    return [
        f"epoch {changed.epoch}, before {changed.previous}; {took}",
        f"back: moesaic expert rollback {changed.previous}",
    ]
