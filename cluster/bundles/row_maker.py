"""Makes the gate rows of a bundle's new experts with a running router, and measures them before they go live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import grpc
import numpy as np

from cluster.bundles.gate_rows import (
    CAPTURES,
    GateMode,
    Prompts,
    arrow_row,
    distance,
    row_of_means,
    split_prompts,
)
from cluster.bundles.model_folder import ModelFolder, open_model
from cluster.observation.reachability import hinting_at_serve
from moesaic import rpc
from moesaic.bundles import Bundle, BundleExpert, effective_values
from moesaic.bundles.bundle import Floats
from moesaic.bundles.manifest import NormMode
from moesaic.client.call_failure import explain
from moesaic.epoch import ExpertAddress, GateRow
from moesaic.errors import InvalidArgument
from moesaic.v1 import common_pb2
from moesaic.v1 import inference_pb2 as pb
from moesaic.v1.inference_pb2_grpc import RouterControlServiceStub

TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class RowOrder:
    """How rows are to be made. `base` is the model's folder, which arrow alone needs."""

    mode: GateMode
    prompts: Prompts | None
    negative: tuple[str, ...] = ()
    base: Path | None = None
    norm: NormMode = "unit"
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class MadeRows:
    """Effective rows by the new expert's place among those of its layer, and what a router says of them."""

    rows: Mapping[ExpertAddress, GateRow]
    measured: pb.MeasureGateRowsResponse | None

    def to_proto(self) -> list[common_pb2.GateRow]:
        return [row.to_proto(address) for address, row in sorted(self.rows.items())]


def order_rows(
    mode: str,
    prompts: Path | None,
    *,
    negative: Path | None = None,
    base: Path | None = None,
    norm: str = "unit",
    temperature: float = 1.0,
) -> RowOrder:
    """Reads the prompts. Raises InvalidArgument with the field at fault."""
    if mode not in get_args(GateMode):
        raise InvalidArgument(f"gate_mode: must be one of {', '.join(get_args(GateMode))}", field="gate_mode")
    if norm not in get_args(NormMode):
        raise InvalidArgument(f"gate_norm: must be one of {', '.join(get_args(NormMode))}", field="gate_norm")
    if not temperature > 0:
        raise InvalidArgument("gate_temperature: must be above zero", field="gate_temperature")
    if mode == "arrow" and base is None:
        raise InvalidArgument("base: arrow compares with the model: give its folder", field="base")
    if mode != "arrow" and prompts is None:
        raise InvalidArgument(f"gate_from: {mode} needs prompts, one a line", field="gate_from")
    return RowOrder(
        mode,  # type: ignore[arg-type]
        None if prompts is None else split_prompts(_text(prompts, "gate_from"), "gate_from"),
        () if negative is None else split_prompts(_text(negative, "gate_against"), "gate_against").used,
        base,
        norm,  # type: ignore[arg-type]
        temperature,
    )


async def make_rows(bundle: Bundle, order: RowOrder, router: str) -> MadeRows:
    """Raises InvalidArgument, or the router's own error."""
    if order.mode != "arrow":
        _check_one_a_layer(bundle.manifest.experts)
    async with rpc.aio_channel(router) as channel:
        maker = _Maker(RouterControlServiceStub(channel), bundle, order)
        with hinting_at_serve():
            try:
                return await maker.make()
            except grpc.aio.AioRpcError as error:
                raise explain(error, router, timeout_s=TIMEOUT_S) from error


@dataclass(frozen=True, slots=True)
class _Maker:
    stub: RouterControlServiceStub
    bundle: Bundle
    order: RowOrder

    async def make(self) -> MadeRows:
        experts = _by_place(self.bundle.manifest.experts)
        values = self._arrows(experts) if self.order.mode == "arrow" else await self._means(experts)
        rows = {
            place: GateRow(effective_values(row, self.order.norm, self.order.temperature).tobytes())
            for place, row in values.items()
        }
        return MadeRows(rows, await self._measure(rows))

    async def _means(self, experts: Mapping[ExpertAddress, BundleExpert]) -> dict[ExpertAddress, Floats]:
        assert self.order.prompts is not None  # order_rows has seen to it
        positive = await self._capture(self.order.prompts.used)
        negative = await self._capture(self.order.negative) if self.order.negative else {}
        if missing := sorted({place.layer for place in experts} - positive.keys()):
            raise InvalidArgument(
                f"gate_from: layer {missing[0]} of the model has no gate", field="gate_from"
            )
        return {place: row_of_means(positive[place.layer], negative.get(place.layer)) for place in experts}

    async def _capture(self, texts: Sequence[str]) -> dict[int, Floats]:
        what = CAPTURES[self.order.mode]
        request = pb.CaptureHiddenRequest(texts=texts, state=what.state, all_tokens=what.all_tokens)
        answer = rpc.received(await self.stub.CaptureHidden(request, timeout=TIMEOUT_S))
        return {layer.layer: np.frombuffer(layer.mean, "<f4") for layer in answer.layers}

    def _arrows(self, experts: Mapping[ExpertAddress, BundleExpert]) -> dict[ExpertAddress, Floats]:
        assert self.order.base is not None
        folder = open_model(self.order.base, "base")
        return {place: _arrow(self.bundle, expert, folder) for place, expert in experts.items()}

    async def _measure(self, rows: Mapping[ExpertAddress, GateRow]) -> pb.MeasureGateRowsResponse | None:
        if self.order.prompts is None:
            return None
        request = pb.MeasureGateRowsRequest(
            texts=self.order.prompts.held_out,
            rows=[row.to_proto(place) for place, row in sorted(rows.items())],
        )
        answer: pb.MeasureGateRowsResponse | None = await self.stub.MeasureGateRows(
            request, timeout=TIMEOUT_S
        )
        return rpc.received(answer)


def _arrow(bundle: Bundle, expert: BundleExpert, folder: ModelFolder) -> Floats:
    # torch, which reads the folder's experts, is wanted by this mode alone.
    from cluster.bundles.weights import dense_values, read_expert

    if expert.layer not in folder.model.experts:
        raise InvalidArgument(f"base: layer {expert.layer} has no experts", field="base")
    layer = folder.model.experts[expert.layer]
    names = [name for name in ("gate", "up") if name in layer.module.weights]
    if any(name not in expert.weights for name in names):
        raise InvalidArgument("gate_mode: arrow needs experts of kind mlp", field="gate_mode")
    own = [bundle.floats(expert.weights[name]) for name in names]
    best, nearest, slot = np.inf, own, 0
    for number in range(layer.num_slots):
        read = read_expert(folder, ExpertAddress(expert.layer, number))
        matrices = [read.matrix(name) for name in names]
        if (apart := distance(own, matrices)) < best:
            best, nearest, slot = apart, matrices, number
    return arrow_row(own, nearest, dense_values(folder, folder.gates()[expert.layer].weight)[slot])


def _by_place(experts: Sequence[BundleExpert]) -> dict[ExpertAddress, BundleExpert]:
    """The new experts by layer, and by their place among those of the layer."""
    counts: dict[int, int] = {}
    places = {}
    for expert in experts:
        index = counts[expert.layer] = counts.get(expert.layer, -1) + 1
        places[ExpertAddress(expert.layer, index)] = expert
    return places


def _check_one_a_layer(experts: Sequence[BundleExpert]) -> None:
    layers = [expert.layer for expert in experts]
    if twice := sorted(layer for layer in set(layers) if layers.count(layer) > 1):
        raise InvalidArgument(
            f"gate_from: the same prompts cannot tell the new experts of layer {twice[0]} apart",
            field="gate_from",
        )


def _text(file: Path, field: str) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{field}: cannot be read as text", field=field) from error
