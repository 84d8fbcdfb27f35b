"""`moesaic convert`: turns a model of pickles into an ordinary Hugging Face folder of safetensors."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from cluster.checkpoints.conversion import Conversion, convert
from cluster.terminal.convert_progress import ConvertProgress
from cluster.terminal.tables import count, files, size


def run_convert(folder: Path, out: Path, *, shard_mib: int, as_json: bool) -> None:
    """Converts with a progress bar and prints a summary. Raises the errors of `convert`."""
    with ConvertProgress(Console(stderr=True)) as progress:
        done = convert(folder, out, max_shard_bytes=shard_mib << 20, show=progress.show)
    print(json.dumps(asdict(done)) if as_json else _summary(done))


def _summary(done: Conversion) -> str:
    kept = f", {done.kept_shards} of them from an earlier run" if done.kept_shards else ""
    return (
        f"{done.family}: {count(done.parameters)} parameters in {done.dtype}, {count(done.active_parameters)} active;\n"
        f"{count(done.tensors)} tensors, {size(done.bytes)}, in {files(done.shards)}{kept}: {done.folder}"
    )
