"""An expert worker whose experts are random: the product's own server, made of weights that no file holds.

Started like `python -m expert_worker`, with the checkpoint whose shape the experts have, and settings from the
environment. Prints `ready grpc=HOST:PORT` and serves until SIGTERM.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from harness.random_experts import fill_expert

from expert_worker.assignment import parse_experts
from expert_worker.config import WorkerConfig
from expert_worker.expert import ExpertForm, ExpertStack, can_stack, empty_stack, make_expert
from expert_worker.expert_store import ExpertStore, HeldExpert
from expert_worker.loader import expert_memory
from expert_worker.server import WorkerServer
from moesaic import telemetry
from moesaic.checkpoint import Checkpoint, open_checkpoint
from moesaic.families import MoeModel, describe_model
from moesaic.manifest import ExpertAddress
from moesaic.settings import load_settings

DRAIN_S = 5.0


class RandomWorker(WorkerServer):
    """A worker that makes its experts, one at a time and where they are computed, in place of reading them."""

    def _load_store(self, checkpoint: Checkpoint, model: MoeModel, form: ExpertForm) -> ExpertStore:
        store = ExpertStore()
        sizes = {"hidden_size": model.hidden_size, "inner_size": model.inner_size}
        stacked = can_stack(form, **sizes)
        for _, of_layer in groupby(sorted(self._config.experts), key=lambda address: address.layer):
            group = list(of_layer)
            stack = empty_stack(len(group), form=form, **sizes) if stacked else None
            for index, address in enumerate(group):
                store.add(address, _make(model, address, form, stack, index))
                self.loaded_bytes += model.expert_bytes
        return store


def _make(
    model: MoeModel, address: ExpertAddress, form: ExpertForm, stack: ExpertStack | None, index: int
) -> HeldExpert:
    gate_up, down = expert_memory(model, form, stack, index)
    fill_expert(gate_up, down, *address)
    # Nobody reads 90 GB back to name them by their content.
    version = hashlib.sha256(f"random {address.layer}.{address.slot}".encode()).digest()
    return HeldExpert(version, make_expert(gate_up, down, model.activation, form, stack, index))


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
    shape = describe_model(open_checkpoint(model))
    config = WorkerConfig(
        name=name,
        model=model,
        experts=parse_experts(experts, num_layers=shape.num_layers, num_slots=shape.num_slots),
        host=settings.host,
        port=port,
        device=settings.device,
        dtype=settings.dtype,
        settings=settings.worker,
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
