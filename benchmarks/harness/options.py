"""Options that every benchmark has, the effects of `--quick`, and settings that several of them share."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from random_checkpoint import Shape, write_checkpoint

from harness.turns import Rules

RESULTS = Path(__file__).resolve().parents[1] / "results"

Out = Annotated[Path, typer.Option(help="Folder for the result's JSON.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="A small model and few repetitions: does it run, not what it shows.")
]
Rounds = Annotated[int, typer.Option(min=1, max=50, help="Rounds in which every side has its turn.")]
Model = Annotated[
    Path | None,
    typer.Option(help="Checkpoint; absent: a random Mixtral, made once and kept in the temporary folder."),
]

STANDARD = Shape()
SMALL = Shape(hidden=256, inner=512, layers=4, heads=8, kv_heads=4, vocabulary=4096)
# Without shared memory, so that the calls of one host go the way that calls between hosts go.
ON_GRPC = {"engine.shared_memory": "off"}
DEMO_MODEL = Path(__file__).resolve().parents[2] / "cluster" / "demo_model"


def rules(rounds: int, quick: bool) -> Rules:
    """A quick run neither waits for a quiet machine nor repeats rounds."""
    return Rules(rounds=min(rounds, 2), retries=0, settle_s=0.0) if quick else Rules(rounds=rounds)


def checkpoint(model: Path | None, quick: bool) -> Path:
    """The folder to serve: the one named, or the random one, which is written where it does not exist yet."""
    if model is not None:
        return model
    folder = Path(tempfile.gettempdir(), "bench_model_small" if quick else "bench_model")
    if not (folder / "model.safetensors.index.json").exists():
        # Renamed when it is complete, because another benchmark may look for it at the same time.
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        write_checkpoint(unfinished, SMALL if quick else STANDARD)
        unfinished.rename(folder)
    return folder


def read_shape(model: Path) -> Shape:
    """The sizes of a Mixtral checkpoint. SystemExit for another family."""
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] != "mixtral":
        raise SystemExit("these benchmarks count the bytes of a Mixtral; --model is something else")
    return Shape.of(config)
