"""What the nodes of a joined Ray say of themselves, and what that means before anything starts there."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from moesaic import __version__
from moesaic.errors import FailedPrecondition

# The setting of Ray, and its default: how long a node goes on without its head.
PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
DEFAULT_PATIENCE_S = 60.0
# What Ray calls storage that a head does not find again after its own end.
_IN_MEMORY = "memory"
_SAME = "install the same one everywhere"
_CURE = f"{PATIENCE}=600 on every node (docs/clusters.md)"


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """The versions in the Python of one node, and how long its Ray goes on without its head."""

    moesaic: str
    torch: str
    python: str
    patience_s: float


def own_facts() -> NodeFacts:
    """The facts of this process. On a node Ray calls it in a process of its own, with the environment of that Ray."""
    return NodeFacts(__version__, _version("torch"), platform.python_version(), _patience_s(os.environ))


def check_versions(own: NodeFacts, nodes: Mapping[str, NodeFacts]) -> tuple[str, ...]:
    """What people should know of the versions on the nodes, by address. Raises FailedPrecondition where Moesaic is
    another one, as its processes would not understand each other."""
    others = [
        f"{facts.moesaic} on node {node}" for node, facts in nodes.items() if facts.moesaic != own.moesaic
    ]
    if others:
        raise FailedPrecondition(
            f"address: Moesaic is {own.moesaic} here and {', '.join(others)}: {_SAME}",
            field="address",
        )
    return tuple(
        f"node {node} has {package} {theirs}, this machine {ours}: {cure}"
        for node, facts in nodes.items()
        for package, ours, theirs, cure in (
            ("torch", own.torch, facts.torch, f"{_SAME}, or the last bits depend on which node computes"),
            ("Python", own.python, facts.python, _SAME),
        )
        if theirs != ours
    )


def explain_head_loss(storage: str | None, nodes: Mapping[str, NodeFacts]) -> str | None:
    """What the loss of Ray's head would cost, with the cure; None where the nodes go on. `storage`: where the head has
    its state, in Ray's words; None: not known."""
    impatient = {
        node: facts.patience_s for node, facts in nodes.items() if facts.patience_s <= DEFAULT_PATIENCE_S
    }
    if storage == _IN_MEMORY:
        end_s = min((facts.patience_s for facts in nodes.values()), default=DEFAULT_PATIENCE_S)
        return (
            f"Ray's head keeps its state in memory: {end_s:.0f} s after its loss all ends, for good; "
            f"start it with RAY_gcs_storage, and Ray with {_CURE}"
        )
    if impatient:
        return (
            f"the Ray of node {', '.join(impatient)} ends {min(impatient.values()):.0f} s after the loss of its head; "
            f"start Ray with {_CURE}"
        )
    return None


def _patience_s(environment: Mapping[str, str]) -> float:
    try:
        return float(environment[PATIENCE])
    except (KeyError, ValueError):
        return DEFAULT_PATIENCE_S


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
