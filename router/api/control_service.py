"""The service of a router for operators: what hidden states of texts are, and what new gate rows would make of them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

from moesaic.epoch import GateRow
from moesaic.errors import InvalidArgument, Unavailable
from moesaic.v1 import inference_pb2, inference_pb2_grpc
from router.api.text_reader import TextReader
from router.engine.captures import GateShares, HiddenMeans, HiddenState

# How long a call may take whose caller sets no deadline.
TIMEOUT_S = 300.0
# New rows of one layer.
MAX_ROWS = 256

_STATES: dict[int, HiddenState] = {
    inference_pb2.HIDDEN_STATE_RESIDUAL: "residual",
    inference_pb2.HIDDEN_STATE_GATE_INPUT: "gate_input",
}


class RouterControlService(inference_pb2_grpc.RouterControlServiceServicer):
    """moesaic.v1.RouterControlService. It raises MoesaicErrors, which moesaic.rpc turns into statuses."""

    def __init__(self) -> None:
        # Set when the router is ready. Until then every call is refused with Unavailable.
        self.reader: TextReader | None = None

    async def CaptureHidden(
        self, request: inference_pb2.CaptureHiddenRequest, context: Any
    ) -> inference_pb2.CaptureHiddenResponse:
        reader = self._reader()
        if request.state not in _STATES:
            raise InvalidArgument("state: must be residual or gate input", field="state")
        texts = await asyncio.to_thread(reader.tokens, request.texts)
        view = reader.view()
        means = HiddenMeans(_STATES[request.state], all_tokens=request.all_tokens)
        await reader.read(texts, view, lambda tokens: means.of_text(len(tokens)), _timeout_s(context))
        return inference_pb2.CaptureHiddenResponse(
            epoch=view.epoch.id,
            layers=[
                inference_pb2.LayerHidden(layer=layer, mean=mean.numpy().astype("<f4").tobytes())
                for layer, mean in means.means().items()
            ],
            num_tokens=sum(map(len, texts)) if request.all_tokens else len(texts),
        )

    async def MeasureGateRows(
        self, request: inference_pb2.MeasureGateRowsRequest, context: Any
    ) -> inference_pb2.MeasureGateRowsResponse:
        reader = self._reader()
        rows = _rows_of(request, reader)
        texts = await asyncio.to_thread(reader.tokens, request.texts)
        view = reader.view()
        shares = GateShares(view, reader.gates, rows)
        await reader.read(texts, view, lambda tokens: shares.of_text(), _timeout_s(context))
        layers = await asyncio.to_thread(lambda: list(shares.shares()))
        return inference_pb2.MeasureGateRowsResponse(
            epoch=view.epoch.id,
            layers=[
                inference_pb2.LayerShare(
                    layer=share.layer,
                    tokens=share.tokens,
                    taken=share.taken,
                    condition_number=share.condition_number,
                )
                for share in layers
            ],
        )

    def _reader(self) -> TextReader:
        if self.reader is None:
            raise Unavailable("the router is loading", reason="LOADING", retry_after_s=1.0)
        return self.reader


def _rows_of(request: inference_pb2.MeasureGateRowsRequest, reader: TextReader) -> dict[int, list[GateRow]]:
    """The new rows by layer, in the order of their numbers."""
    numbered: defaultdict[int, dict[int, GateRow]] = defaultdict(dict)
    for index, message in enumerate(request.rows):
        address, row = GateRow.from_proto(message)
        gate = reader.gates.get(address.layer)
        if gate is None or len(row.values) != 4 * gate.hidden_size or address.slot in numbered[address.layer]:
            field = f"rows[{index}]"
            raise InvalidArgument(
                f"{field}: must be one of a layer with a gate, as long as its hidden states, and numbered from 0",
                field=field,
            )
        numbered[address.layer][address.slot] = row
    if not numbered or any(len(of_layer) > MAX_ROWS for of_layer in numbered.values()):
        raise InvalidArgument(f"rows: must be 1 to {MAX_ROWS} of a layer", field="rows")
    return {layer: [row for _, row in sorted(of_layer.items())] for layer, of_layer in numbered.items()}


def _timeout_s(context: Any) -> float:
    remaining_s: float | None = context.time_remaining()
    return TIMEOUT_S if remaining_s is None else remaining_s
