"""The clusters that a drill can run on: one of `moesaic serve`, one by hand with a worker to poison, or a running one.

A cluster that a drill starts is made of processes of their own. Ray ends whoever is connected to it when it is lost,
and a drill has to survive what it does.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from cluster.bench.load import ask_model_name
from cluster.control.placement import layer_loads, place_experts
from cluster.drill.child import Child
from cluster.launch.ports import with_ports
from cluster.launch.serve import CheckedModel
from moesaic.addresses import join_address
from moesaic.epoch import ExpertAddress
from moesaic.settings import Settings

POISONED = "expert-worker-0"
# A local Ray gives its processes the cores of the machine in turn; by hand every worker has one.
THREADS = 1


@dataclass(slots=True)
class Site:
    """A cluster under drill. `children` started it; there are none where it ran before.

    `by_hand`: the workers that this program started itself, whom no controller knows.
    """

    url: str
    grpc: str
    model: str
    children: tuple[Child, ...] = ()
    by_hand: Mapping[str, Child] = field(default_factory=dict)
    # How many processes had to be killed at the end.
    left_behind: int = 0

    @property
    def has_ended(self) -> bool:
        """Whether a program that the cluster consists of has ended by itself."""
        return any(child.has_ended for child in self.children)

    @property
    def last_words(self) -> str:
        """The last lines of the programs that have ended."""
        return " | ".join(child.last_words() for child in self.children if child.has_ended)

    @property
    def pids(self) -> tuple[int, ...]:
        """Every process of the cluster, Ray's included, where a drill started it."""
        return tuple(process.pid for child in self.children for process in child.members())


@contextlib.asynccontextmanager
async def running_site(url: str, grpc: str) -> AsyncIterator[Site]:
    """A cluster that somebody else runs. Raises Unavailable."""
    yield Site(url, grpc, await ask_model_name(url))


@contextlib.asynccontextmanager
async def served_site(settings: Settings, model: CheckedModel) -> AsyncIterator[Site]:
    """`moesaic serve` with these settings on free ports. Raises Unavailable when it does not start."""
    settings = with_ports(settings)
    with _folder() as folder:
        config = _write_settings(settings, folder)
        command = (sys.executable, "-m", "cluster.cli.main", "serve", "--json", "--config", str(config))
        child = await Child.start("serve", command, folder)
        site = Site("", "", model.name, (child,))
        try:
            ready = json.loads(await child.first_line(settings.cluster.start_timeout_s))["ready"]
            site.url, site.grpc = f"http://{ready['http']}", ready["grpc"]
            yield site
        finally:
            site.left_behind = await child.end()


@contextlib.asynccontextmanager
async def hand_made_site(settings: Settings, model: CheckedModel) -> AsyncIterator[Site]:
    """Workers, a router and a gateway by hand, without Ray or controller; POISONED can be told to answer with NaN."""
    settings = with_ports(settings)
    settings = settings.model_copy(
        update={
            "model": str(model.folder),
            "served_model_name": model.name,
            "worker": settings.worker.model_copy(update={"threads": settings.worker.threads or THREADS}),
        }
    )
    with _folder() as folder:
        hand = _Hand(settings, model, folder)
        site = Site("", "", model.name)
        try:
            await hand.start(site)
            yield site
        finally:
            site.left_behind = await hand.end()


class _Hand:
    """Starts the programs of a cluster as a person would."""

    def __init__(self, settings: Settings, model: CheckedModel, folder: Path) -> None:
        self._settings = settings
        self._model = model
        self._folder = folder
        self._config = str(_write_settings(settings, folder))
        self._children: list[Child] = []

    async def start(self, site: Site) -> None:
        """Fills in the site. The workers load side by side."""
        settings, path = self._settings, str(self._model.folder)
        workers = {
            name: await self._start(name, _worker_command(name, experts, self._config, path))
            for name, experts in _shares(settings, self._model).items()
        }
        named = [
            argument
            for worker in workers.values()
            for argument in ("--worker", (await self._ready(worker)).removeprefix("ready grpc="))
        ]
        router = _module(
            "router", "--model", path, "--port", str(settings.grpc_port), "--config", self._config, *named
        )
        await self._ready(await self._start("router", router))
        site.grpc = join_address(settings.host, settings.grpc_port)
        gateway = _module(
            "gateway", "--router", site.grpc, "--port", str(settings.http_port), "--config", self._config
        )
        await self._ready(await self._start("gateway", gateway))
        site.url = f"http://{join_address(settings.host, settings.http_port)}"
        site.by_hand, site.children = workers, tuple(self._children)

    async def end(self) -> int:
        """From the outside in. Returns how many processes had to be killed."""
        return sum([await child.end() for child in reversed(self._children)])

    async def _start(self, name: str, command: tuple[str, ...]) -> Child:
        child = await Child.start(name, command, self._folder)
        self._children.append(child)
        return child

    async def _ready(self, child: Child) -> str:
        return await child.first_line(self._settings.cluster.start_timeout_s)


def _shares(settings: Settings, model: CheckedModel) -> dict[str, frozenset[ExpertAddress]]:
    """The experts of each worker by its name."""
    num_workers = settings.cluster.workers or 1
    placed = place_experts(layer_loads(model.shape), num_workers, settings.cluster.replicas)
    return {f"expert-worker-{index}": experts for index, experts in enumerate(placed)}


def _worker_command(
    name: str, experts: frozenset[ExpertAddress], config: str, folder: str
) -> tuple[str, ...]:
    named = ",".join(f"{layer}:{slot}" for layer, slot in sorted(experts))
    if name == POISONED:
        return _module("cluster.drill.poisoned_worker", config, named, name)
    return _module("expert_worker", "--model", folder, "--experts", named, "--name", name, "--config", config)


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *arguments)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="moesaic-drill-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _write_settings(settings: Settings, folder: Path) -> Path:
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_defaults=True)))
    return file
