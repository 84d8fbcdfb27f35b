"""The scaling model's pure parts: expectations, the fit, and the simulation that checks them."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from steps.chart import draw_clusters, draw_steps
from steps.clusters import EIGHT_220B, H200, H200_GRPC, MIXTRAL_8X7B, Kind, experts_bytes, forecast
from steps.fit import Point, fit_costs, least_squares
from steps.model import (
    Costs,
    Load,
    ModelShape,
    Node,
    count_distribution,
    expected_maximum,
    inclusion,
    layer_bytes,
    layer_demand,
    step_time,
)
from steps.simulation import simulate

SHAPE = ModelShape("small", 8, 1024, 8, 2, 11_010_048, 54_000_000, weight_bytes=4, row_bytes=4)
NODE = Node(bandwidth=37e9, flops=200e9)
COSTS = Costs(
    router_layer_s=200e-6, router_row_s=100e-6, pass_s=50e-6, call_s=300e-6, fan_out_s=100e-6, byte_s=1e-9
)


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0, 3.0])
def test_inclusion_adds_up_to_the_experts_of_a_token_and_nobody_is_chosen_more_than_always(
    skew: float,
) -> None:
    chosen = inclusion(8, 2, skew)
    assert sum(chosen) == pytest.approx(2)
    assert max(chosen) <= 1
    assert chosen == sorted(chosen, reverse=True)


def test_the_count_of_independent_events_is_a_distribution_with_their_mean() -> None:
    distribution = count_distribution([0.25, 0.5, 1.0])
    assert sum(distribution) == pytest.approx(1)
    assert sum(count * mass for count, mass in enumerate(distribution)) == pytest.approx(1.75)
    assert distribution[0] == 0


def test_the_maximum_of_two_coins_is_what_enumeration_gives() -> None:
    assert expected_maximum([[0.5, 0.5], [0.5, 0.5]]) == pytest.approx(0.75)
    assert expected_maximum([[0.0, 0.0, 1.0], [0.5, 0.5]]) == pytest.approx(2)


def test_one_worker_reads_every_expert_of_a_token() -> None:
    demand = layer_demand(SHAPE, Load(rows=1, workers=1))
    assert demand.busiest_experts == pytest.approx(2)
    assert demand.busiest_rows == pytest.approx(2)
    assert demand.workers_asked == pytest.approx(1)


def test_many_rows_reach_every_expert() -> None:
    demand = layer_demand(SHAPE, Load(rows=512, workers=1))
    assert demand.busiest_experts == pytest.approx(8)
    assert demand.busiest_rows == pytest.approx(1024)


def test_two_workers_share_a_token_as_enumeration_says() -> None:
    pairs = list(combinations(range(8), 2))
    asked = sum(len({slot % 2 for slot in pair}) for pair in pairs) / len(pairs)
    busiest = sum(max(sum(slot % 2 == w for slot in pair) for w in (0, 1)) for pair in pairs) / len(pairs)
    demand = layer_demand(SHAPE, Load(rows=1, workers=2))
    assert demand.workers_asked == pytest.approx(asked)
    assert demand.busiest_experts == pytest.approx(busiest, rel=0.05)


def test_a_row_goes_once_to_a_worker_and_comes_back_once_for_every_expert() -> None:
    row = 1024 * 4
    assert layer_bytes(SHAPE, rows=3, workers_asked=1) == 3 * (1 + 2) * row
    assert layer_bytes(SHAPE, rows=3, workers_asked=2) == 3 * (2 + 2) * row


def test_a_step_costs_more_with_more_rows_and_less_with_faster_machines() -> None:
    one, many = (step_time(SHAPE, Load(rows, 1), NODE, NODE, COSTS) for rows in (1, 16))
    fast = Node(2 * NODE.bandwidth, 2 * NODE.flops)
    assert many.total_s > one.total_s
    assert step_time(SHAPE, Load(1, 1), fast, fast, COSTS).total_s < one.total_s


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [1, 4, 16, 64])
def test_model_and_simulation_agree_on_even_routing(rows: int, workers: int) -> None:
    load = Load(rows, workers)
    modelled = step_time(SHAPE, load, NODE, NODE, COSTS).total_s
    assert modelled == pytest.approx(simulate(SHAPE, load, NODE, NODE, COSTS), rel=0.15)


def test_a_simulation_says_the_same_again() -> None:
    load = Load(rows=4, workers=4, skew=1.0)
    assert simulate(SHAPE, load, NODE, NODE, COSTS, steps=3) == simulate(
        SHAPE, load, NODE, NODE, COSTS, steps=3
    )


def test_skewed_routing_is_slower_in_model_and_simulation_where_products_decide() -> None:
    slow = Node(bandwidth=1e12, flops=10e9)
    even, skewed = (Load(rows=64, workers=8, skew=skew) for skew in (0.0, 1.0))
    for time_of in (
        lambda load: step_time(SHAPE, load, NODE, slow, COSTS).total_s,
        lambda load: simulate(SHAPE, load, NODE, slow, COSTS),
    ):
        assert time_of(skewed) > 1.2 * time_of(even)


def test_the_fit_finds_the_costs_that_made_the_points() -> None:
    loads = [Load(rows, workers) for rows in (1, 4, 16, 256) for workers in (1, 2, 4)]
    steps = [step_time(SHAPE, load, NODE, NODE, COSTS) for load in loads]
    points = [
        Point("", load, step.router_s, step.compute_s, step.overhead_s)
        for load, step in zip(loads, steps, strict=True)
    ]
    fit = fit_costs(SHAPE, points)
    assert fit.node.bandwidth == pytest.approx(NODE.bandwidth, rel=1e-6)
    assert fit.node.flops == pytest.approx(NODE.flops, rel=1e-6)
    for name in ("router_layer_s", "router_row_s", "pass_s", "call_s", "fan_out_s", "byte_s"):
        assert getattr(fit.costs, name) == pytest.approx(getattr(COSTS, name), rel=1e-6), name


def test_a_fit_wants_more_than_one_number_of_rows() -> None:
    point = Point("", Load(1, 1), 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="two numbers of rows"):
        fit_costs(SHAPE, [point, point])


def test_least_squares_never_gives_a_negative_cost() -> None:
    coefficients = least_squares([(1, 1), (1, 2), (1, 3)], [3, 2, 1])
    assert min(coefficients) >= 0


def test_more_nodes_do_not_shorten_a_step_and_serve_more_routers() -> None:
    kind = Kind("", H200, H200, H200_GRPC, weight_bytes=2)
    (entry,) = forecast(MIXTRAL_8X7B, kind, nodes=(8, 64), batches=(16,))
    few, many = entry.by_nodes[8], entry.by_nodes[64]
    assert many.tokens_per_s == pytest.approx(8 * few.tokens_per_s)
    assert many.routers == pytest.approx(8 * few.routers)
    assert few.tokens_per_s == pytest.approx(few.routers * entry.tokens_per_s)


def test_one_h200_node_an_expert_takes_what_the_bandwidth_says() -> None:
    free = replace(H200_GRPC, pass_s=0.0)
    step = step_time(MIXTRAL_8X7B, Load(1, 8), H200, H200, free)
    # 352 MB of one expert at 4.3 TB/s, 32 layers.
    assert step.compute_s == pytest.approx(2.6e-3, rel=0.02)


def test_the_shapes_have_the_parameters_they_are_named_for() -> None:
    def total(shape: ModelShape) -> float:
        return shape.layers * shape.experts * shape.expert_parameters + shape.router_parameters

    assert total(MIXTRAL_8X7B) == pytest.approx(46.7e9, rel=0.01)
    assert total(EIGHT_220B) == pytest.approx(1.2346e12, rel=0.01)
    assert experts_bytes(MIXTRAL_8X7B, 512) == MIXTRAL_8X7B.expert_bytes


def test_both_pictures_are_drawn(tmp_path: Path) -> None:
    points = [
        Point("", Load(rows, workers), 0.01, 0.02, 0.003) for workers in (1, 4) for rows in (1, 16, 512)
    ]
    modelled = [step_time(SHAPE, point.load, NODE, NODE, COSTS) for point in points]
    draw_steps(tmp_path / "steps.png", points, modelled, [step.total_s for step in modelled])
    draw_steps(tmp_path / "decode.png", points[:2], modelled[:2], [0.03, 0.03])
    kind = Kind("H200", H200, H200, H200_GRPC, weight_bytes=2)
    draw_clusters(tmp_path / "clusters.png", {"a model": forecast(MIXTRAL_8X7B, kind)[2]})
    assert all(file.stat().st_size > 10_000 for file in tmp_path.glob("*.png"))
    assert len(list(tmp_path.glob("*.png"))) == 3
