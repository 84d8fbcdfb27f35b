"""Placement: every expert is somewhere, its copies are apart, and nobody carries more than a fair share."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.control.placement import (
    MAX_WORKERS,
    LayerLoad,
    Node,
    Shelf,
    choose_shelves,
    place_experts,
    seat_routers,
    seat_workers,
)
from moesaic.epoch import ExpertAddress
from moesaic.errors import InvalidArgument


def even(num_layers: int, num_slots: int) -> dict[int, LayerLoad]:
    return dict.fromkeys(range(num_layers), LayerLoad(num_slots, 100))


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    num_layers, num_slots = draw(st.integers(1, 12)), draw(st.integers(1, 24))
    replicas = draw(st.integers(1, 4))
    most = min(MAX_WORKERS, num_layers * num_slots * replicas)
    num_workers = draw(st.integers(min(replicas, most), most))
    return num_layers, num_slots, num_workers, min(replicas, num_workers)


@given(shapes())
def test_every_expert_is_on_just_as_many_different_workers_as_replicas(
    shape: tuple[int, int, int, int],
) -> None:
    num_layers, num_slots, num_workers, replicas = shape
    placement = place_experts(even(num_layers, num_slots), num_workers, replicas)
    copies = Counter(expert for worker in placement for expert in worker)
    assert len(placement) == num_workers
    assert copies == {
        ExpertAddress(layer, slot): replicas for layer in range(num_layers) for slot in range(num_slots)
    }


@given(shapes())
def test_workers_differ_by_at_most_one_expert_in_each_layer_and_in_all(
    shape: tuple[int, int, int, int],
) -> None:
    num_layers, num_slots, num_workers, replicas = shape
    placement = place_experts(even(num_layers, num_slots), num_workers, replicas)
    totals = [len(worker) for worker in placement]
    assert max(totals) - min(totals) <= 1
    assert min(totals) >= 1
    for layer in range(num_layers):
        counts = [sum(expert.layer == layer for expert in worker) for worker in placement]
        assert max(counts) - min(counts) <= 1


@given(shapes(), st.data())
def test_weights_keep_every_expert_placed_and_its_copies_apart(
    shape: tuple[int, int, int, int], data: st.DataObject
) -> None:
    num_layers, num_slots, num_workers, replicas = shape
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=num_workers, max_size=num_workers))
    try:
        placement = place_experts(even(num_layers, num_slots), num_workers, replicas, weights)
    except InvalidArgument as error:
        assert error.field == "weights"
        return
    copies = Counter(expert for worker in placement for expert in worker)
    assert len(copies) == num_layers * num_slots
    assert set(copies.values()) == {replicas}
    assert all(placement)


def test_weights_decide_how_many_experts_a_worker_holds() -> None:
    placement = place_experts(even(4, 8), 3, weights=[1, 1, 2])
    assert [len(worker) for worker in placement] == [8, 8, 16]


def test_a_heavy_worker_holds_each_expert_once_and_the_rest_goes_to_the_others() -> None:
    placement = place_experts(even(2, 4), 3, replicas=2, weights=[100, 1, 1])
    assert [len(worker) for worker in placement] == [8, 4, 4]


def test_a_placement_is_the_same_every_time() -> None:
    assert place_experts(even(6, 8), 5, 2) == place_experts(even(6, 8), 5, 2)


@pytest.mark.parametrize(
    ("arguments", "field", "says"),
    [
        ((2, 4, 9, 1), "workers", "9 workers for 8 experts: at most 8"),
        ((32, 8, 65, 1), "workers", "must be in [1, 64]"),
        ((2, 4, 0, 1), "workers", "must be in [1, 64]"),
        ((0, 4, 1, 1), "workers", "the model has no experts for one to hold"),
        ((2, 4, 2, 3), "replicas", "3 copies of an expert need 3 workers, there are 2"),
        ((2, 4, 2, 0), "replicas", "must be at least 1"),
        ((2, 4, 2, 1, [1.0]), "weights", "must name all 2 workers"),
        ((2, 4, 2, 1, [1.0, 0.0]), "weights", "must be finite and above 0"),
        ((1, 2, 2, 1, [1.0, 1000.0]), "weights", "worker 0 would hold no expert"),
    ],
)
def test_an_impossible_placement_names_the_field_and_the_limit(
    arguments: tuple[int, ...], field: str, says: str
) -> None:
    num_layers, num_slots, *rest = arguments
    with pytest.raises(InvalidArgument, match=r".*") as refused:
        place_experts(even(num_layers, num_slots), *rest)  # type: ignore[arg-type]
    assert refused.value.field == field
    assert says in refused.value.message


@st.composite
def mixed_models(draw: st.DrawFn) -> tuple[dict[int, LayerLoad], int, int]:
    """Layers of any sizes, some of them dense; workers; replicas."""
    load = st.builds(LayerLoad, st.one_of(st.just(1), st.integers(1, 12)), st.integers(1, 1000))
    layers = draw(st.dictionaries(st.integers(0, 40), load, min_size=1, max_size=12))
    replicas = draw(st.integers(1, 3))
    most = min(MAX_WORKERS, sum(load.num_slots for load in layers.values()) * replicas)
    num_workers = draw(st.integers(min(replicas, most), most))
    return layers, num_workers, min(replicas, num_workers)


@given(mixed_models())
def test_layers_of_different_sizes_are_placed_just_as_often(
    wanted: tuple[dict[int, LayerLoad], int, int],
) -> None:
    layers, num_workers, replicas = wanted
    placement = place_experts(layers, num_workers, replicas)
    assert Counter(expert for worker in placement for expert in worker) == {
        ExpertAddress(layer, slot): replicas
        for layer, load in layers.items()
        for slot in range(load.num_slots)
    }
    assert all(placement)


@given(mixed_models())
def test_bytes_differ_by_at_most_the_largest_expert_and_numbers_in_a_layer_by_one(
    wanted: tuple[dict[int, LayerLoad], int, int],
) -> None:
    layers, num_workers, replicas = wanted
    placement = place_experts(layers, num_workers, replicas)
    totals = [sum(layers[expert.layer].num_bytes for expert in worker) for worker in placement]
    assert max(totals) - min(totals) <= max(load.num_bytes for load in layers.values())
    for layer in layers:
        counts = [sum(expert.layer == layer for expert in worker) for worker in placement]
        assert max(counts) - min(counts) <= 1


def test_the_layers_of_a_dense_model_go_around_the_workers() -> None:
    placement = place_experts(even(8, 1), 3)
    assert [sorted(expert.layer for expert in worker) for worker in placement] == [
        [0, 3, 6],
        [1, 4, 7],
        [2, 5],
    ]


def test_small_layers_make_up_for_what_a_large_one_could_not_split() -> None:
    layers = {0: LayerLoad(1, 10), 1: LayerLoad(1, 10), 2: LayerLoad(1, 30), 3: LayerLoad(1, 10)}
    placement = place_experts(layers, 2)
    assert [sorted(expert.layer for expert in worker) for worker in placement] == [[2], [0, 1, 3]]


def same_host(placement: tuple[frozenset[ExpertAddress], ...], hosts: list[str]) -> int:
    """How many experts have more than one copy on some host."""
    copies = Counter(
        (expert, host) for host, worker in zip(hosts, placement, strict=True) for expert in worker
    )
    return len({expert for (expert, _), number in copies.items() if number > 1})


@pytest.mark.parametrize(
    ("num_nodes", "num_workers"),
    [(2, 4), (2, 8), (2, 16), (3, 6), (4, 8), (4, 32), (2, 2), (3, 3), (3, 4), (4, 9)],
)
def test_two_copies_of_an_expert_are_on_two_hosts_wherever_there_are_two(
    num_nodes: int, num_workers: int
) -> None:
    hosts = [f"host-{index % num_nodes}" for index in range(num_workers)]
    placement = place_experts(even(4, 8), num_workers, replicas=2, hosts=hosts)
    assert same_host(placement, hosts) == 0
    assert set(Counter(expert for worker in placement for expert in worker).values()) == {2}


@st.composite
def seated(draw: st.DrawFn) -> tuple[dict[int, LayerLoad], int, list[str], list[float] | None]:
    """Layers, replicas, the host of each worker, and weights or none."""
    layers, num_workers, replicas = draw(mixed_models())
    hosts = draw(st.lists(st.sampled_from("abcdef"), min_size=num_workers, max_size=num_workers))
    weights = st.lists(st.integers(1, 64), min_size=num_workers, max_size=num_workers)
    return layers, replicas, hosts, draw(st.none() | weights)


@given(seated())
def test_copies_are_on_as_many_hosts_as_there_are_whatever_the_hosts_and_weights(
    case: tuple[dict[int, LayerLoad], int, list[str], list[float] | None],
) -> None:
    layers, replicas, hosts, weights = case
    try:
        placement = place_experts(layers, len(hosts), replicas, weights, hosts)
    except InvalidArgument as error:
        assert error.field == "weights"
        return
    held_on: dict[ExpertAddress, list[str]] = {}
    for host, worker in zip(hosts, placement, strict=True):
        for expert in worker:
            held_on.setdefault(expert, []).append(host)
    assert {len(held) for held in held_on.values()} == {replicas}
    assert {len(set(held)) for held in held_on.values()} == {min(replicas, len(set(hosts)))}
    assert len(held_on) == sum(load.num_slots for load in layers.values())


def test_a_host_with_fewer_workers_holds_a_copy_of_everything_where_that_keeps_copies_apart() -> None:
    placement = place_experts(even(4, 8), 3, replicas=2, hosts=["a", "a", "b"])
    assert [len(worker) for worker in placement] == [16, 16, 32]


CPU_NODE = Node("a", "10.0.0.1", num_cpus=8, num_gpus=0)
GPU_NODE = Node("b", "10.0.0.2", num_cpus=16, num_gpus=2)


def test_by_default_each_node_without_a_gpu_and_each_gpu_gets_one_worker() -> None:
    seats = seat_workers([CPU_NODE, GPU_NODE], None, "auto", home="a")
    assert [(seat.node.id, seat.num_gpus, seat.threads) for seat in seats] == [
        ("a", 0, 8),
        ("b", 1, 8),
        ("b", 1, 8),
    ]


def test_on_cpu_each_node_gets_one_worker_whatever_gpus_it_has() -> None:
    seats = seat_workers([CPU_NODE, GPU_NODE], None, "cpu", home="a")
    assert [(seat.node.id, seat.num_gpus, seat.threads) for seat in seats] == [("a", 0, 8), ("b", 0, 16)]


def test_workers_go_around_the_nodes_and_share_their_cores() -> None:
    seats = seat_workers([CPU_NODE, GPU_NODE], 3, "cpu", home="a")
    assert [(seat.node.id, seat.threads) for seat in seats] == [("a", 4), ("b", 16), ("a", 4)]


def test_a_worker_always_has_a_thread() -> None:
    assert {seat.threads for seat in seat_workers([CPU_NODE], 20, "cpu", home="a")} == {1}


def test_workers_on_one_gpu_share_it_with_the_router() -> None:
    node = Node("c", "127.0.0.1", num_cpus=4, num_gpus=1)
    seats = seat_workers([node], 3, "cuda", home="c")
    assert [seat.num_gpus for seat in seats] == [0.25, 0.25, 0.25]
    assert [router.num_gpus for router in seat_routers([node], seats, 1, "cuda", home="c")] == [0.25]


def test_shares_of_gpus_are_equal_on_a_node_so_that_any_packing_fits() -> None:
    workers = seat_workers([GPU_NODE], 4, "cuda", home="b", num_routers=2)
    routers = seat_routers([GPU_NODE], workers, 2, "cuda", home="b")
    assert [seat.num_gpus for seat in (*workers, *routers)] == [0.3333] * 6


def test_a_router_runs_at_home_with_all_its_cores() -> None:
    seats = seat_workers([CPU_NODE, GPU_NODE], 4, "cpu", home="a")
    (router,) = seat_routers([CPU_NODE, GPU_NODE], seats, 1, "cpu", home="a")
    assert (router.node.id, router.num_gpus, router.threads) == ("a", 0, 8)


def test_routers_go_around_the_nodes_from_home_and_share_their_cores_with_each_other() -> None:
    seats = seat_workers([CPU_NODE, GPU_NODE], 4, "cpu", home="b", num_routers=3)
    routers = seat_routers([CPU_NODE, GPU_NODE], seats, 3, "cpu", home="b")
    assert [(seat.node.id, seat.threads) for seat in routers] == [("b", 8), ("a", 8), ("b", 8)]


@pytest.mark.parametrize(("home", "nodes"), [("a", ["a", "d", "a"]), ("b", ["b", "b", "b"])])
def test_all_routers_compute_on_the_kind_of_device_that_home_has(home: str, nodes: list[str]) -> None:
    other = Node("d", "10.0.0.4", num_cpus=8, num_gpus=0)
    routers = seat_routers([CPU_NODE, GPU_NODE, other], [], 3, "auto", home=home)
    assert [seat.node.id for seat in routers] == nodes


def test_the_default_stays_within_the_number_of_experts() -> None:
    assert len(seat_workers([CPU_NODE, GPU_NODE], None, "auto", home="a", at_most=2)) == 2


def test_a_model_without_experts_gets_no_workers() -> None:
    assert seat_workers([CPU_NODE, GPU_NODE], None, "auto", home="a", at_most=0) == ()


def test_asking_for_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(InvalidArgument) as refused:
        seat_workers([CPU_NODE], None, "cuda", home="a")
    assert refused.value.field == "device"


def test_a_node_without_cpus_for_ray_is_no_place_for_a_worker() -> None:
    head = Node("h", "10.0.0.9", num_cpus=0, num_gpus=0, free_cpus=0)
    seats = seat_workers([CPU_NODE, head, GPU_NODE], 4, "cpu", home="a")
    assert [seat.node.id for seat in seats] == ["a", "b", "a", "b"]


def test_workers_take_no_more_than_the_cpus_that_are_free() -> None:
    nodes = [
        Node("a", "10.0.0.1", num_cpus=4, num_gpus=0, free_cpus=4),
        Node("b", "10.0.0.2", num_cpus=2, num_gpus=0, free_cpus=2),
        Node("c", "10.0.0.3", num_cpus=1, num_gpus=0, free_cpus=1),
        Node("d", "10.0.0.4", num_cpus=2, num_gpus=0, free_cpus=2),
    ]
    seats = seat_workers(nodes, 8, "cpu", home="a")
    assert Counter(seat.node.id for seat in seats) == {"a": 3, "b": 2, "c": 1, "d": 2}


def test_more_workers_than_free_cpus_are_refused_with_what_each_node_has() -> None:
    nodes = [
        Node("a", "10.0.0.1", num_cpus=4, num_gpus=0, free_cpus=2),
        Node("b", "10.0.0.2", num_cpus=2, num_gpus=0, free_cpus=0),
    ]
    with pytest.raises(InvalidArgument) as refused:
        seat_workers(nodes, 2, "cpu", home="a")
    assert refused.value.field == "workers"
    assert "2 of 4 on 10.0.0.1, 0 of 2 on 10.0.0.2" in refused.value.message


def test_by_default_a_busy_node_gets_no_worker() -> None:
    nodes = [
        Node("a", "10.0.0.1", num_cpus=4, num_gpus=0, free_cpus=4),
        Node("b", "10.0.0.2", num_cpus=2, num_gpus=0, free_cpus=0),
    ]
    assert [seat.node.id for seat in seat_workers(nodes, None, "cpu", home="a")] == ["a"]


def test_the_first_router_stays_at_home_also_where_no_cpu_is_free() -> None:
    head = Node("h", "10.0.0.9", num_cpus=0, num_gpus=0, free_cpus=0)
    other = Node("b", "10.0.0.2", num_cpus=4, num_gpus=0, free_cpus=4)
    routers = seat_routers([head, other], [], 3, "cpu", home="h")
    assert [seat.node.id for seat in routers] == ["h", "b", "b"]


def test_more_routers_than_free_cpus_are_refused() -> None:
    with pytest.raises(InvalidArgument) as refused:
        seat_routers([Node("a", "10.0.0.1", 1, 0, free_cpus=1)], [], 2, "cpu", home="a")
    assert refused.value.field == "routers"


def test_an_added_expert_goes_to_other_hosts_then_to_room_then_to_whoever_has_few() -> None:
    shelves = [
        Shelf("w0", "a", 90, 2),
        Shelf("w1", "a", 50, 0),
        Shelf("w2", "b", 5, 0),
        Shelf("w3", "b", 60, 1),
    ]
    sizes = dict.fromkeys(["w0", "w1", "w2", "w3"], 10)
    assert choose_shelves(shelves, sizes, 1) == ["w1"]
    assert choose_shelves(shelves, sizes, 2) == ["w1", "w3"]
    assert choose_shelves(shelves, sizes, 9) == ["w1", "w3", "w0", "w2"]
    assert choose_shelves(shelves, sizes, 2, holders={"w3"}) == ["w3", "w1"]
    assert choose_shelves(shelves, sizes, 1, holders={"w0", "w2"}) == ["w0", "w2"]
