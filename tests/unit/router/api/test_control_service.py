"""Hidden states of texts against those inside transformers, and new gate rows measured against the rule by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import write_mixtral
from support.hand_made import HandMadeExpert, load_model
from support.view_rig import ViewRig, view_rig

from moesaic.epoch import ExpertAddress, GateRow
from moesaic.errors import InvalidArgument, MoesaicError, Unavailable, Unsupported
from moesaic.v1 import inference_pb2 as pb
from router.api.control_service import RouterControlService
from router.api.text_reader import MAX_TEXTS, TextReader
from router.engine.captures import condition_number
from router.engine.engine import Engine
from router.gating.model_view import EpochViews
from router.text.text import Text

TEXTS = [
    "the first of the texts",
    "another",
    "b",
    "and one that is longer than all the others together, by far",
]
MAX_LEN = 200
WAIT_S = 60.0


class ByteText:
    """Every byte is a token."""

    has_tokenizer = True

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(byte % 96 for byte in text.encode())


class Context:
    """Of a call with a deadline."""

    def time_remaining(self) -> float:
        return WAIT_S


@dataclass
class Site:
    service: RouterControlService
    rig: ViewRig
    engine: Engine
    model: Any

    def texts(self) -> list[torch.Tensor]:
        return [torch.tensor([ByteText().encode(text, add_special_tokens=True)]) for text in TEXTS]


@asynccontextmanager
async def serving(folder: Path, *, added: bool = False, **engine: Any) -> AsyncIterator[Site]:
    with view_rig(folder, **engine) as rig:
        model = load_model(folder)
        epoch = rig.base
        if added:
            expert = HandMadeExpert.random(model, 0, 1)
            epoch = rig.add({ExpertAddress(0, 4): expert})
        views = EpochViews(epoch, rig.loaded.gates, rig.loaded.shape.hidden_size)

        running = rig.engine()
        running.start()
        service = RouterControlService()
        service.reader = TextReader(
            running,
            cast(Text, ByteText()),
            rig.loaded.model.gates,
            lambda: views.plain,
            max_model_len=MAX_LEN,
        )
        try:
            yield Site(service, rig, running, model)
        finally:
            running.stop(WAIT_S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixtral(tmp_path_factory.mktemp("tiny"))


@torch.inference_mode()
def hidden_states(model: Any, texts: Sequence[torch.Tensor], state: int) -> list[list[torch.Tensor]]:
    """By layer and text, [T, D]."""
    found: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = []
    for index, layer in enumerate(model.model.layers):
        module = layer if state == pb.HIDDEN_STATE_RESIDUAL else layer.mlp.gate

        def keep(module: Any, inputs: Any, index: int = index) -> None:
            found[index].append(inputs[0].reshape(-1, inputs[0].shape[-1]))

        hooks.append(module.register_forward_pre_hook(keep))
    for text in texts:
        model(text)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    "engine",
    [{"decoder": "lean"}, {"decoder": "hf"}, {"overlap": "on"}, {"max_batch_tokens": 16}],
    ids=["lean", "hf", "overlap", "pieces"],
)
@pytest.mark.parametrize("state", [pb.HIDDEN_STATE_RESIDUAL, pb.HIDDEN_STATE_GATE_INPUT])
async def test_means_are_those_of_the_states_inside_transformers(
    folder: Path, engine: dict[str, Any], state: pb.HiddenState
) -> None:
    async with serving(folder, **engine) as site:
        states = hidden_states(site.model, site.texts(), state)
        for all_tokens in (True, False):
            request = pb.CaptureHiddenRequest(texts=TEXTS, state=state, all_tokens=all_tokens)
            # Twice: what the first call left in the prefix cache must not keep tokens from the second.
            for _ in range(2):
                answer = await site.service.CaptureHidden(request, Context())
                assert answer.epoch == site.rig.base.id
                assert [layer.layer for layer in answer.layers] == [0, 1]
                for layer, of_texts in zip(answer.layers, states, strict=True):
                    wanted = torch.cat([rows if all_tokens else rows[-1:] for rows in of_texts])
                    assert answer.num_tokens == len(wanted)
                    mean = torch.frombuffer(bytearray(layer.mean), dtype=torch.float32)
                    torch.testing.assert_close(mean, wanted.mean(dim=0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("decoder", ["lean", "hf"])
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("added", [False, True])
async def test_tokens_that_would_choose_a_new_row_are_counted_by_the_rule(
    folder: Path, decoder: str, invariant: bool, added: bool
) -> None:
    if invariant and decoder == "hf":
        pytest.skip("only the lean decoder is batch-invariant")
    async with serving(folder, decoder=decoder, batch_invariant=invariant, added=added) as site:
        generator = torch.Generator().manual_seed(4)
        rows = torch.randn(2, 32, generator=generator) / 32**0.5
        messages = [
            GateRow(row.numpy().tobytes()).to_proto(ExpertAddress(0, slot)) for slot, row in enumerate(rows)
        ]
        answer = await site.service.MeasureGateRows(
            pb.MeasureGateRowsRequest(texts=TEXTS, rows=reversed(messages)), Context()
        )
        hidden = torch.cat(hidden_states(site.model, site.texts(), pb.HIDDEN_STATE_GATE_INPUT)[0])
        weight = site.model.model.layers[0].mlp.gate.weight.detach()
        if added:
            weight = torch.cat((weight, HandMadeExpert.random(site.model, 0, 1).row[None]))
        weight = torch.cat((weight, rows))
        chosen = F.linear(hidden, weight).topk(2).indices
        (layer,) = answer.layers
        assert (layer.layer, layer.tokens) == (0, len(hidden))
        assert layer.taken == int((chosen >= len(weight) - 2).any(dim=1).sum()) > 0
        assert layer.condition_number == pytest.approx(condition_number(weight), rel=1e-3)
        computed = {group.slot for request in site.rig.requests() for group in request.experts}
        assert max(computed) < len(weight) - 2


def test_rows_that_point_the_same_way_have_no_condition_and_orthogonal_ones_the_best() -> None:
    assert condition_number(torch.eye(3) * torch.tensor([[1.0], [5.0], [9.0]])) == pytest.approx(1.0)
    assert condition_number(torch.tensor([[1.0, 0.0], [2.0, 0.0]])) > 1e6


ROW = GateRow(bytes(4 * 32)).to_proto(ExpertAddress(0, 0))


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.CaptureHiddenRequest(texts=TEXTS), "state"),
        (pb.CaptureHiddenRequest(state=pb.HIDDEN_STATE_RESIDUAL), "texts"),
        (pb.CaptureHiddenRequest(state=pb.HIDDEN_STATE_RESIDUAL, texts=["a"] * (MAX_TEXTS + 1)), "texts"),
        (pb.CaptureHiddenRequest(state=pb.HIDDEN_STATE_RESIDUAL, texts=["a", ""]), "texts[1]"),
        (pb.CaptureHiddenRequest(state=pb.HIDDEN_STATE_RESIDUAL, texts=["a" * (MAX_LEN + 1)]), "texts[0]"),
        (pb.MeasureGateRowsRequest(texts=TEXTS), "rows"),
        (pb.MeasureGateRowsRequest(texts=TEXTS, rows=[ROW, ROW]), "rows[1]"),
        (
            pb.MeasureGateRowsRequest(texts=TEXTS, rows=[GateRow(b"abcd").to_proto(ExpertAddress(0, 0))]),
            "rows[0]",
        ),
        (
            pb.MeasureGateRowsRequest(texts=TEXTS, rows=[GateRow(bytes(128)).to_proto(ExpertAddress(7, 0))]),
            "rows[0]",
        ),
    ],
)
async def test_what_cannot_be_read_is_refused_by_field(folder: Path, request_: Any, field: str) -> None:
    async with serving(folder) as site:
        service = site.service
        call = (
            service.CaptureHidden
            if isinstance(request_, pb.CaptureHiddenRequest)
            else service.MeasureGateRows
        )
        with pytest.raises(InvalidArgument) as refused:
            await call(request_, Context())
        assert refused.value.field == field


async def test_a_router_that_loads_or_whose_gates_cannot_be_read_says_so(folder: Path) -> None:
    request = pb.CaptureHiddenRequest(texts=TEXTS, state=pb.HIDDEN_STATE_RESIDUAL)
    with pytest.raises(Unavailable):
        await RouterControlService().CaptureHidden(request, Context())
    async with serving(folder) as site:
        assert site.service.reader is not None
        site.service.reader.gates = {}
        with pytest.raises(Unsupported):
            await site.service.CaptureHidden(request, Context())


async def test_a_caller_that_leaves_or_a_failure_leaves_nothing_in_the_engine(folder: Path) -> None:
    async with serving(folder) as site:
        request = pb.CaptureHiddenRequest(texts=TEXTS * 20, state=pb.HIDDEN_STATE_RESIDUAL)
        call = asyncio.create_task(site.service.CaptureHidden(request, Context()))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        site.rig.forget()
        with pytest.raises(MoesaicError):
            await site.service.CaptureHidden(request, Context())
        async with asyncio.timeout(WAIT_S):
            while site.engine.num_open:
                await asyncio.sleep(0.01)
