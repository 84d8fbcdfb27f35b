"""Rows that are made with a running router, which reads the prompts and measures the rows on others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.bundles import make_bundle
from support.checkpoints import write_mixtral
from support.played_controller import PlayedLifecycle, PlayedRouterControl, playing_lifecycle

from cluster.bundles.row_maker import make_rows, order_rows
from moesaic.bundles import Bundle
from moesaic.epoch import ExpertAddress
from moesaic.errors import InvalidArgument, Unavailable
from moesaic.v1 import inference_pb2 as pb

MEANS = {0: np.arange(32, dtype="f4"), 1: np.ones(32, "f4")}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixtral(tmp_path_factory.mktemp("base"))


@pytest.fixture
def bundle(tmp_path: Path, base: Path) -> Bundle:
    return make_bundle(tmp_path / "maths-v1", base, ((0, None), (1, None)), gate_rows=False)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"{number} + {number} =" for number in range(10)))
    return file


@pytest.mark.parametrize(
    ("mode", "state", "all_tokens"),
    [
        ("hidden", pb.HIDDEN_STATE_RESIDUAL, False),
        ("hidden_ffn", pb.HIDDEN_STATE_GATE_INPUT, False),
        ("mean-activation", pb.HIDDEN_STATE_GATE_INPUT, True),
    ],
)
async def test_each_mode_reads_its_own_state(
    bundle: Bundle, prompts: Path, mode: str, state: pb.HiddenState, all_tokens: bool
) -> None:
    router = PlayedRouterControl(hidden={(state, all_tokens): MEANS})
    async with playing_lifecycle(PlayedLifecycle(), router) as (address, _):
        made = await make_rows(bundle, order_rows(mode, prompts, temperature=0.5), address)
    assert len(router.read[0].texts) == 8
    assert len(router.measured[0].texts) == 2
    assert made.rows.keys() == {ExpertAddress(0, 0), ExpertAddress(1, 0)}
    row = np.frombuffer(made.rows[ExpertAddress(0, 0)].values, "<f4")
    assert np.allclose(row, 2 * MEANS[0] / np.linalg.norm(MEANS[0]), rtol=1e-6)
    assert list(router.measured[0].rows) == made.to_proto()
    assert made.measured is not None
    assert [layer.taken for layer in made.measured.layers] == [3, 3]


async def test_negative_prompts_are_read_as_well(bundle: Bundle, prompts: Path, tmp_path: Path) -> None:
    router = PlayedRouterControl(hidden={(pb.HIDDEN_STATE_GATE_INPUT, False): MEANS})
    against = tmp_path / "against.txt"
    against.write_text("once upon a time")
    async with playing_lifecycle(PlayedLifecycle(), router) as (address, _):
        made = await make_rows(bundle, order_rows("hidden_ffn", prompts, negative=against), address)
    assert [list(request.texts) for request in router.read][1] == ["once upon a time"]
    assert not np.frombuffer(made.rows[ExpertAddress(0, 0)].values, "<f4").any()


async def test_arrow_needs_no_prompts(bundle: Bundle, base: Path) -> None:
    router = PlayedRouterControl()
    async with playing_lifecycle(PlayedLifecycle(), router) as (address, _):
        made = await make_rows(bundle, order_rows("arrow", None, base=base), address)
    assert (router.read, router.measured, made.measured) == ([], [], None)
    for row in made.rows.values():
        assert np.linalg.norm(np.frombuffer(row.values, "<f4")) == pytest.approx(1, rel=1e-5)


async def test_the_same_prompts_cannot_tell_two_experts_of_a_layer_apart(
    tmp_path: Path, base: Path, prompts: Path
) -> None:
    pair = make_bundle(tmp_path / "pair", base, ((0, None), (0, None)))
    with pytest.raises(InvalidArgument, match="apart"):
        await make_rows(pair, order_rows("hidden", prompts), "127.0.0.1:1")


async def test_a_router_that_is_not_there_is_named(bundle: Bundle, prompts: Path) -> None:
    with pytest.raises(Unavailable, match=r"no router answers at 127\.0\.0\.1:1"):
        await make_rows(bundle, order_rows("hidden", prompts), "127.0.0.1:1")


@pytest.mark.parametrize(
    ("mode", "given", "field"),
    [
        ("random", {}, "gate_mode"),
        ("hidden", {"prompts": None}, "gate_from"),
        ("hidden", {"norm": "l1"}, "gate_norm"),
        ("hidden", {"temperature": 0.0}, "gate_temperature"),
        ("hidden", {"temperature": float("nan")}, "gate_temperature"),
        ("hidden", {"prompts": Path("/nowhere")}, "gate_from"),
        ("arrow", {}, "base"),
    ],
)
def test_bad_orders_name_their_option(prompts: Path, mode: str, given: dict[str, object], field: str) -> None:
    arguments: dict[str, object] = {"prompts": prompts} | given
    with pytest.raises(InvalidArgument) as refused:
        order_rows(mode, **arguments)  # type: ignore[arg-type]
    assert refused.value.field == field
