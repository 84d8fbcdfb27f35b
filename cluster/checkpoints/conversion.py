"""The conversion of a folder of pickles into an ordinary Hugging Face folder of safetensors.

Everything is checked before anything is written: the family must be supported, the model complete, and the
disk large enough. Memory holds one tensor and a bounded part of the mapped files. A run that was killed can
be resumed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.checkpoints.conversion_folder import ConversionFolder, find_companions
from cluster.checkpoints.conversion_plan import plan_shards, plan_tensors
from cluster.checkpoints.pickled_model import PickledModel, open_pickles
from cluster.terminal.convert_progress import Progressed
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.errors import DataLoss, InvalidArgument
from moesaic.families import MoeModel, describe_model


@dataclass(frozen=True, slots=True)
class Conversion:
    """The result of a conversion. `kept_shards`: those that an earlier run had written."""

    folder: str
    family: str
    parameters: int
    active_parameters: int
    dtype: str
    tensors: int
    shards: int
    kept_shards: int
    bytes: int


def convert(
    folder: Path, out: Path, *, max_shard_bytes: int, show: Callable[[Progressed], None]
) -> Conversion:
    """Converts `folder` into `out`. `show` is called after every tensor.

    Raises CheckpointError for what cannot be converted, InvalidArgument for an `out` that cannot be written.
    """
    pickled = open_pickles(folder)
    model = describe_model(pickled.checkpoint, "experts")
    shards = plan_shards(plan_tensors(pickled.checkpoint, model), max_shard_bytes)
    mark = {"source": pickled.fingerprint, "max_shard_bytes": max_shard_bytes}
    target = ConversionFolder(out, mark, shards, find_companions(folder))
    try:
        kept = _write(target, pickled, model, show)
    except OSError as error:
        raise InvalidArgument(f"out: cannot be written: {error.strerror}", field="out") from error
    written = describe_model(open_checkpoint(out), "experts")
    if written.num_parameters != model.num_parameters:
        raise DataLoss("the new folder does not hold the parameters of the old one")
    return Conversion(
        folder=str(out),
        family=model.family,
        parameters=model.num_parameters,
        active_parameters=model.num_active_parameters,
        dtype=model.dtype,
        tensors=sum(len(shard.tensors) for shard in shards),
        shards=len(shards),
        kept_shards=kept,
        bytes=sum(shard.num_bytes for shard in shards),
    )


def _write(
    target: ConversionFolder, pickled: PickledModel, model: MoeModel, show: Callable[[Progressed], None]
) -> int:
    """Writes the missing files. Returns the number of shards that were there."""
    with target.claimed():
        missing = target.missing()
        kept = len(target.shards) - len(missing)
        total_bytes = sum(shard.num_bytes for shard in target.shards)
        done_bytes = total_bytes - sum(shard.num_bytes for shard in missing)
        for done_shards, shard in enumerate(missing, start=kept):

            def add(num_bytes: int, done_shards: int = done_shards) -> None:
                nonlocal done_bytes
                done_bytes += num_bytes
                show(Progressed(done_bytes, total_bytes, done_shards, len(target.shards)))

            target.write_shard(shard, pickled.read, add)
        show(Progressed(total_bytes, total_bytes, len(target.shards), len(target.shards)))
        target.finish(_config(pickled, model))
    return kept


def _config(pickled: PickledModel, model: MoeModel) -> dict[str, Any]:
    """The config in Hugging Face's form, which also names the dtype."""
    config = dict(pickled.checkpoint.config)
    return config if {"torch_dtype", "dtype"} & config.keys() else config | {"torch_dtype": model.dtype}
