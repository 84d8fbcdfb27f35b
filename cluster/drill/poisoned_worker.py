"""An expert worker whose answers can be poisoned: `python -m cluster.drill.poisoned_worker CONFIG EXPERTS NAME`.

SIGUSR1: from now on it answers every call with NaN. SIGUSR2: it computes as it should. It is no part of a server:
a drill that starts a cluster by hand puts it in the place of one worker.
"""

from __future__ import annotations

import asyncio
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expert_worker.compute.call import ExpertCall
from expert_worker.compute.compute_pass import compute_calls
from expert_worker.config import WorkerConfig
from expert_worker.experts.expert_ranges import parse_experts
from expert_worker.server import WorkerServer
from moesaic import telemetry
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.errors import MoesaicError
from moesaic.families import describe_model
from moesaic.settings import Settings, load_settings
from moesaic.stop_signals import serve_until_signal

POISON, CURE = signal.SIGUSR1, signal.SIGUSR2


class PoisonableCompute:
    """The computation of a worker, a `ComputeCalls`, which puts NaN in place of every number while it is poisoned."""

    def __init__(self) -> None:
        self.poisoned = False

    def __call__(self, calls: Sequence[ExpertCall]) -> list[Any]:
        outputs = compute_calls(calls)
        if self.poisoned:
            outputs = [
                output if isinstance(output, MoesaicError) else output.new_full(output.shape, math.nan)
                for output in outputs
            ]
        return outputs

    def poison(self) -> None:
        self.poisoned = True

    def cure(self) -> None:
        self.poisoned = False


def main(config: Path, experts: str, name: str) -> None:
    """Serves like `python -m expert_worker`, until SIGTERM."""
    settings = load_settings(config)
    telemetry.configure(name, otlp_endpoint=None, log_level=settings.log_level)
    asyncio.run(_serve(_worker_config(settings, experts, name), settings.cluster.drain_timeout_s))


def _worker_config(settings: Settings, experts: str, name: str) -> WorkerConfig:
    assert settings.model is not None  # who starts this program has written it into the file
    model = describe_model(open_checkpoint(settings.model), settings.dense_layers)
    return WorkerConfig(
        name=name,
        model=Path(settings.model),
        experts=parse_experts(experts, model.num_slots),
        host=settings.host,
        port=0,
        device=settings.device,
        dtype=settings.dtype,
        settings=settings.worker,
        dense_layers=settings.dense_layers,
    )


async def _serve(config: WorkerConfig, drain_s: float) -> None:
    compute = PoisonableCompute()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(POISON, compute.poison)
    loop.add_signal_handler(CURE, compute.cure)
    server = WorkerServer(config, compute=compute)

    async def start() -> None:
        address = await server.start()
        await server.load()
        print(f"ready grpc={address}", flush=True)

    await serve_until_signal(start(), lambda: server.stop(drain_s))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
