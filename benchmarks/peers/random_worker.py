"""An expert worker whose experts are random: the product's own server with weights that no file holds.

It is started like `python -m expert_worker`, with a checkpoint that gives the shape of the experts, and
settings from the environment. It prints `ready grpc=HOST:PORT` and serves until SIGTERM.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
from pathlib import Path
from typing import Annotated

import typer
from harness.random_experts import fill_expert

from expert_worker.config import WorkerConfig
from expert_worker.experts.expert import ExpertForm, make_expert
from expert_worker.experts.expert_ranges import parse_experts
from expert_worker.experts.loader import ExpertLoader, choose_places
from expert_worker.experts.stack import ExpertStacks, Place
from expert_worker.experts.store import ExpertStore, HeldExpert
from expert_worker.experts.stored_weight import stored_bytes
from expert_worker.server import WorkerServer
from moesaic import telemetry
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.epoch import ExpertAddress
from moesaic.families import describe_model
from moesaic.families.model import ExpertModule
from moesaic.settings import load_settings

DRAIN_S = 5.0


class RandomWorker(WorkerServer):
    """A worker that makes its experts on its device, one at a time, instead of reading them."""

    def _load_store(self, loader: ExpertLoader, stacks: ExpertStacks) -> ExpertStore:
        store, model = ExpertStore(), loader.model
        for address, place in choose_places(model, self._config.experts, stacks):
            experts = model.experts[address.layer]
            store.add(address, _make(address, place, experts.module, loader.form))
            self.loaded_bytes += stored_bytes(loader.checkpoint, experts, address)
        return store


def _make(address: ExpertAddress, place: Place, module: ExpertModule, form: ExpertForm) -> HeldExpert:
    weights = place.memory(module, form)
    fill_expert(weights.up, weights.down, *address)
    # A digest of the content would take reading 90 GB back.
    version = hashlib.sha256(f"random {address.layer}.{address.slot}".encode()).digest()
    return HeldExpert(version, make_expert(weights, module, form, place.row))


def main(
    model: Annotated[Path, typer.Option()],
    name: str = "worker-0",
    experts: str = "all",
    port: int = 0,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Serves random experts of a model's shape."""
    settings = load_settings(None, model=str(model), worker={"threads": threads})
    telemetry.configure(name, otlp_endpoint=settings.otlp_endpoint, log_level=settings.log_level)
    shape = describe_model(open_checkpoint(model), settings.dense_layers)
    config = WorkerConfig(
        name=name,
        model=model,
        experts=parse_experts(experts, shape.num_slots),
        host=settings.host,
        port=port,
        device=settings.device,
        dtype=settings.dtype,
        settings=settings.worker,
        dense_layers=settings.dense_layers,
    )
    asyncio.run(_serve(config))


async def _serve(config: WorkerConfig) -> None:
    server = RandomWorker(config)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    address = await server.start()
    try:
        await server.load()
        print(f"ready grpc={address}", flush=True)
        await stopping.wait()
    finally:
        await server.stop(DRAIN_S)


if __name__ == "__main__":
    typer.run(main)
