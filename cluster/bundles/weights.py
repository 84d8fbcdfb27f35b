"""The weights of model folders: experts read and computed by the very code of a worker, gates by that of a router.

Shapes: D hidden size, E slots of a layer, P probe vectors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.bundles.model_folder import ModelFolder
from expert_worker.experts.expert import ExpertForm, ExpertWeights, make_expert
from expert_worker.experts.expert_reader import ExpertReader, Scratch
from expert_worker.experts.stored_weight import locate
from moesaic.bundles.bundle import Floats, TensorSource
from moesaic.epoch import ExpertAddress
from moesaic.families.model import ExpertModule
from router.decoders.dense_tensors import read_dense

# The tensor that all experts of a bundle share.
PROBE_INPUTS = "probe_inputs"
NUM_PROBES = 4
_PROBE_SEED = 20_260_101
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_BYTES_AT_ONCE = 1 << 24
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class ReadExpert:
    """An expert in memory, decoded if the folder stores codes."""

    module: ExpertModule
    version: bytes
    weights: Mapping[str, Tensor]

    def probe(self) -> tuple[Floats, Floats]:
        """Inputs and answers, each [P, D]; the inputs are those of every expert of this width."""
        rows = probe_inputs(self.module.hidden_size)
        expert = make_expert(self._joined(), self.module, ExpertForm(_CPU, torch.float32))
        with torch.inference_mode():
            return rows, expert(torch.from_numpy(rows)).numpy()

    def matrix(self, name: str) -> Floats:
        """A weight as float32."""
        values: Floats = self.weights[name].float().numpy()
        return values

    def _joined(self) -> ExpertWeights:
        into = ("gate", "up") if self.module.gated else ("up",)
        parts = {name: weight.float() for name, weight in self.weights.items()}
        biased = self.module.biased
        return ExpertWeights(
            torch.cat([parts[name] for name in into]),
            parts["down"],
            torch.cat([parts[f"{name}_bias"] for name in into]) if biased else None,
            parts["down_bias"] if biased else None,
        )


def probe_inputs(hidden_size: int) -> Floats:
    """[P, D], the same for every bundle: each row has mean square one, as rows have after a norm."""
    rows = np.random.Generator(np.random.PCG64(_PROBE_SEED)).standard_normal((NUM_PROBES, hidden_size))
    scaled: Floats = (rows / np.sqrt((rows**2).mean(axis=1, keepdims=True))).astype(np.float32)
    return scaled


def read_expert(folder: ModelFolder, address: ExpertAddress) -> ReadExpert:
    """Raises CheckpointError that names the tensor or the file at fault."""
    experts = folder.model.experts[address.layer]
    reader, weights = _reader(folder, address), dict[str, Tensor]()
    for matrix in ("gate", "up", "down") if experts.module.gated else ("up", "down"):
        weights |= _read(reader, folder, address.layer, matrix)
    return ReadExpert(experts.module, reader.version(experts.module, experts.dtype), weights)


def with_added(expert: ReadExpert, added: Mapping[str, Floats]) -> ReadExpert:
    """The expert, in float32, with something added to some of its weights. Its version is not known."""
    weights = {name: weight.float() for name, weight in expert.weights.items()}
    for name, values in added.items():
        weights[name] = weights[name] + torch.from_numpy(values)
    return ReadExpert(expert.module, b"", weights)


def weight_source(folder: ModelFolder, address: ExpertAddress, name: str) -> TensorSource:
    """One weight of an expert, which is read when it is written."""
    experts = folder.model.experts[address.layer]

    def pieces() -> Iterator[memoryview]:
        read = _read(_reader(folder, address), folder, address.layer, name.removesuffix("_bias"))
        flat = read[name].reshape(-1).view(torch.uint8).numpy().data
        for first in range(0, len(flat), _BYTES_AT_ONCE):
            yield flat[first : first + _BYTES_AT_ONCE]

    return TensorSource(_STORED[experts.dtype], experts.module.shape(name), pieces)


def difference(one: ReadExpert, other: ReadExpert) -> float:
    """How far two experts are apart, relative to the norm of the other; 0 only if they are equal."""
    pairs = [(one.weights[name].float(), other.weights[name].float()) for name in other.weights]
    apart = sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in pairs)
    norm = sum(float(b.square().sum(dtype=torch.float64)) for _, b in pairs)
    return _relative(apart, norm)


def dense_difference(one: ModelFolder, other: ModelFolder, name: str) -> float:
    """The same for a tensor of routers, by the name of its parameter, which both have in one shape."""
    ours, theirs = _dense(one, name), _dense(other, name)
    apart = float((ours - theirs).square().sum(dtype=torch.float64))
    return _relative(apart, float(theirs.square().sum(dtype=torch.float64)))


def dense_values(folder: ModelFolder, name: str) -> Floats:
    """A tensor of routers as float32."""
    values: Floats = _dense(folder, name).numpy()
    return values


def _relative(apart: float, norm: float) -> float:
    """Of sums of squares. Differences from nothing are infinitely large."""
    if apart == 0:
        return 0.0
    return float("inf") if norm == 0 else float((apart / norm) ** 0.5)


def _dense(folder: ModelFolder, name: str) -> Tensor:
    wanted = {name: folder.model.dense[name]}
    return next(iter(read_dense(folder.checkpoint, wanted, dtype=torch.float32, device=_CPU)))[1]


def _reader(folder: ModelFolder, address: ExpertAddress) -> ExpertReader:
    weights = locate(folder.checkpoint, folder.model.experts[address.layer], address)
    return ExpertReader(weights, threading.Event(), Scratch())


def _read(reader: ExpertReader, folder: ModelFolder, layer: int, matrix: str) -> dict[str, Tensor]:
    """A matrix, with its bias if it has one."""
    experts = folder.model.experts[layer]
    module, dtype = experts.module, _DTYPES[experts.dtype]
    weight = torch.empty(module.shape(matrix), dtype=dtype)
    if not module.biased:
        reader.read((matrix,), weight, None)
        return {matrix: weight}
    bias = torch.empty(module.shape(f"{matrix}_bias"), dtype=dtype)
    reader.read((matrix,), weight, bias)
    return {matrix: weight, f"{matrix}_bias": bias}
