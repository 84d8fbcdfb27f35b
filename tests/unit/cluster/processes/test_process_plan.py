"""The process plan: what is started for some settings, a model and some nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import write_mixtral
from support.sparse_checkpoints import TINY_MISTRAL, write_sparse_decoder

from cluster.control.placement import Node
from cluster.control.rollout_config import RolloutConfig
from cluster.processes.process_plan import PlannedProcess, check_counts, plan_processes
from cluster.processes.specs import ControllerSpec, ExpertWorkerSpec, GatewaySpec, RouterSpec
from moesaic.bundles import BaseModel
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.checkpoints.identity import FolderIdentity
from moesaic.errors import InvalidArgument
from moesaic.families import MoeModel, describe_model
from moesaic.settings import Settings, load_settings
from moesaic.v1 import control_pb2

HOME = Node("home", "10.0.0.1", num_cpus=8, num_gpus=0)
OTHER = Node("other", "10.0.0.2", num_cpus=16, num_gpus=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MoeModel:
    return describe_model(open_checkpoint(write_mixtral(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_decoder(tmp_path_factory.mktemp("dense"), TINY_MISTRAL)


def planned(model: MoeModel, settings: Settings, *nodes: Node) -> tuple[PlannedProcess, ...]:
    return plan_processes(
        settings, Path("/models/tiny"), "mine", model, nodes or (HOME,), "home", rollout_of(model)
    )


def rollout_of(model: MoeModel) -> RolloutConfig:
    return RolloutConfig.of(Settings(), BaseModel(bytes(32), model), Path("/tmp/state"))


def settings(**flags: Any) -> Settings:
    return load_settings(**flags)


def configs(processes: tuple[PlannedProcess, ...], kind: type) -> list[Any]:
    return [spec.config for spec in specs(processes, kind)]


def specs(processes: tuple[PlannedProcess, ...], kind: type) -> list[Any]:
    return [process.spec for process in processes if isinstance(process.spec, kind)]


def test_there_is_one_controller_one_router_one_gateway_and_the_workers(model: MoeModel) -> None:
    processes = planned(model, settings(cluster={"workers": 3}))
    assert [process.spec.name for process in processes] == [
        "router-0",
        "controller",
        "expert-worker-0",
        "expert-worker-1",
        "expert-worker-2",
        "gateway",
    ]


def test_the_workers_hold_every_expert_and_the_controller_knows_which(model: MoeModel) -> None:
    processes = planned(model, settings(cluster={"workers": 3}))
    workers = configs(processes, ExpertWorkerSpec)
    (controller,) = specs(processes, ControllerSpec)
    assert sum(len(worker.experts) for worker in workers) == len(model.addresses)
    members = {member.name: member for member in controller.cluster.members}
    assert {worker.name: worker.experts for worker in workers} == {
        name: members[name].experts for name in controller.cluster.workers
    }
    assert controller.cluster.experts == set(model.addresses)


def test_public_addresses_and_names_come_from_the_settings(model: MoeModel) -> None:
    processes = planned(
        model,
        settings(host="0.0.0.0", http_port=1, grpc_port=2, engine={"threads": 3}),
    )
    (router,), (gateway,) = configs(processes, RouterSpec), configs(processes, GatewaySpec)
    assert (router.host, router.port, router.served_name, router.engine.threads) == (
        "0.0.0.0",
        2,
        "mine",
        3,
    )
    assert (gateway.host, gateway.port) == ("0.0.0.0", 1)


def test_router_gateway_and_controller_stay_on_the_node_of_the_command(model: MoeModel) -> None:
    processes = planned(model, settings(cluster={"workers": 2}), HOME, OTHER)
    assert {process.spec.name: process.seat.node.id for process in processes if process.pinned} == {
        "router-0": "home",
        "controller": "home",
        "gateway": "home",
    }


def test_several_routers_are_all_known_to_the_gateway_and_the_controller(model: MoeModel) -> None:
    processes = planned(model, settings(cluster={"routers": 3, "workers": 2}))
    names = ("router-0", "router-1", "router-2")
    (gateway,), (controller,) = specs(processes, GatewaySpec), specs(processes, ControllerSpec)
    assert tuple(router.name for router in specs(processes, RouterSpec)) == gateway.routers == names
    members = {member.name: member.role for member in controller.cluster.members}
    assert {members[name] for name in names} == {control_pb2.PROCESS_ROLE_ROUTER}


def test_only_the_first_router_has_the_public_address_and_may_not_move(model: MoeModel) -> None:
    processes = planned(
        model, settings(host="0.0.0.0", grpc_port=2, device="cpu", cluster={"routers": 3}), HOME, OTHER
    )
    routers = [process for process in processes if isinstance(process.spec, RouterSpec)]
    assert [(it.pinned, it.spec.is_public) for it in routers] == [
        (True, True),
        (False, False),
        (False, False),
    ]
    assert [(it.host, it.port) for it in configs(processes, RouterSpec)] == [
        ("0.0.0.0", 2),
        ("10.0.0.2", 0),
        ("10.0.0.1", 0),
    ]


def test_workers_run_on_a_gpu_where_there_is_one_and_share_the_cores_of_their_node(model: MoeModel) -> None:
    workers = configs(planned(model, settings(cluster={"workers": 3}), HOME, OTHER), ExpertWorkerSpec)
    assert [(worker.device, worker.settings.threads) for worker in workers] == [
        ("cpu", 4),
        ("cuda", 16),
        ("cpu", 4),
    ]


def test_a_tiny_model_takes_no_more_workers_than_it_has_experts(model: MoeModel) -> None:
    nodes = [Node(str(index), f"10.0.0.{index}", 4, 0) for index in range(20)]
    processes = plan_processes(settings(), Path("/models/tiny"), "mine", model, nodes, "3", rollout_of(model))
    assert len(specs(processes, ExpertWorkerSpec)) == len(model.addresses)


def test_the_layers_of_a_dense_model_are_spread_over_the_workers(dense_folder: Path) -> None:
    model = describe_model(open_checkpoint(dense_folder))
    workers = configs(planned(model, settings(cluster={"workers": 2})), ExpertWorkerSpec)
    assert [sorted(worker.experts) for worker in workers] == [[(0, 0), (2, 0)], [(1, 0)]]


def test_a_dense_model_in_the_router_has_no_workers_and_every_process_is_told(dense_folder: Path) -> None:
    model = describe_model(open_checkpoint(dense_folder), "router")
    processes = planned(model, settings(dense_layers="router", cluster={"routers": 2}), HOME, OTHER)
    assert [process.spec.name for process in processes] == ["router-0", "router-1", "controller", "gateway"]
    (controller,) = specs(processes, ControllerSpec)
    assert (controller.cluster.experts, controller.cluster.workers) == (frozenset(), frozenset())
    assert {router.dense_layers for router in configs(processes, RouterSpec)} == {"router"}
    check_counts(settings(dense_layers="router"), model)


def test_where_dense_layers_are_computed_reaches_routers_and_workers(model: MoeModel) -> None:
    processes = planned(model, settings(dense_layers="experts", cluster={"workers": 2}))
    told = [*configs(processes, RouterSpec), *configs(processes, ExpertWorkerSpec)]
    assert [config.dense_layers for config in told] == ["experts"] * 3


def test_workers_that_would_hold_nothing_are_refused(dense_folder: Path) -> None:
    model = describe_model(open_checkpoint(dense_folder), "router")
    with pytest.raises(InvalidArgument, match="the model has no experts") as refused:
        check_counts(settings(cluster={"workers": 1}), model)
    assert refused.value.field == "workers"


def test_a_number_of_workers_that_cannot_be_is_refused_before_anything_runs(model: MoeModel) -> None:
    with pytest.raises(InvalidArgument, match="9 workers for 8 experts: at most 8") as refused:
        check_counts(settings(cluster={"workers": 9}), model)
    assert refused.value.field == "workers"
    check_counts(settings(), model)


def test_a_worker_with_more_cores_holds_more_experts(model: MoeModel) -> None:
    nodes = [Node("home", "10.0.0.1", 2, 0), Node("b", "10.0.0.2", 6, 0)]
    workers = configs(planned(model, settings(cluster={"workers": 2}), *nodes), ExpertWorkerSpec)
    assert [len(worker.experts) for worker in workers] == [2, 6]


def test_a_node_too_small_for_a_single_expert_takes_its_even_share_all_the_same(model: MoeModel) -> None:
    nodes = [Node("home", "10.0.0.1", 1, 0), Node("b", "10.0.0.2", 1000, 0)]
    workers = configs(planned(model, settings(cluster={"workers": 2}), *nodes), ExpertWorkerSpec)
    assert [len(worker.experts) for worker in workers] == [4, 4]


def test_copies_of_an_expert_are_on_different_nodes(model: MoeModel) -> None:
    processes = planned(model, settings(device="cpu", cluster={"workers": 4, "replicas": 2}), HOME, OTHER)
    nodes: dict[object, set[str]] = {}
    for process in processes:
        if isinstance(process.spec, ExpertWorkerSpec):
            for expert in process.spec.config.experts:
                nodes.setdefault(expert, set()).add(process.seat.node.id)
    assert all(len(held_on) == 2 for held_on in nodes.values())


def test_the_first_router_reserves_no_cpu_where_its_node_has_none_for_ray(model: MoeModel) -> None:
    head, other = Node("home", "10.0.0.1", 0, 0, free_cpus=0), Node("b", "10.0.0.2", 4, 0, free_cpus=4)
    processes = {process.spec.name: process for process in planned(model, settings(), head, other)}
    assert (processes["router-0"].num_cpus, processes["router-0"].pinned) == (0, True)
    assert processes["expert-worker-0"].seat.node.id == "b"


def test_every_process_that_reads_the_folder_is_told_what_it_must_be(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_mixtral(tmp_path / "tiny"))
    identity = FolderIdentity.of(checkpoint)
    processes = plan_processes(
        settings(device="cpu", cluster={"routers": 2}),
        checkpoint.folder,
        "mine",
        describe_model(checkpoint),
        [HOME, OTHER],
        "home",
        rollout_of(describe_model(checkpoint)),
        identity,
    )
    readers = [*configs(processes, RouterSpec), *configs(processes, ExpertWorkerSpec)]
    assert [reader.identity for reader in readers] == [identity] * 4


@pytest.mark.parametrize(
    ("source", "told"), [("hf://tiny/mixtral", "hf://tiny/mixtral"), ("/models/tiny", None), (None, None)]
)
def test_whoever_reads_a_model_of_the_hub_is_told_its_name(
    model: MoeModel, source: str | None, told: str | None
) -> None:
    processes = planned(model, settings(model=source, cluster={"workers": 2, "routers": 2}))
    assert [spec.source for spec in specs(processes, ExpertWorkerSpec)] == [told, told]
    assert [spec.source for spec in specs(processes, RouterSpec)] == [told, told]
