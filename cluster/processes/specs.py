"""The specs of the processes of a cluster.

A spec is plain data that is sent to the process. The server is made there, and the heavy packages are
imported only there: neither the command nor the controller nor the gateway ever loads torch.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

from cluster.control.controller import Cluster
from cluster.control.rollout_config import RolloutConfig
from expert_worker.config import WorkerConfig
from gateway.config import GatewayConfig
from router.config import RouterConfig

CONTROLLER = "controller"
GATEWAY = "gateway"


def router_names(num_routers: int) -> tuple[str, ...]:
    """The names of the routers of a cluster. The first one has the public gRPC address."""
    return tuple(f"router-{index}" for index in range(num_routers))


@dataclass(frozen=True, slots=True)
class ControllerSpec:
    """The controller, with the processes of the cluster, and how its experts may change."""

    cluster: Cluster
    rollout: RolloutConfig

    @property
    def name(self) -> str:
        return CONTROLLER


@dataclass(frozen=True, slots=True)
class ExpertWorkerSpec:
    """One expert worker. It listens at the address of the node on which it runs."""

    config: WorkerConfig
    # The model's name at the hub, from where a node gets what it lacks; None for a model that is only a folder.
    source: str | None = None

    @property
    def name(self) -> str:
        return self.config.name


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """One router. If it `is_public` it listens at the address of its config, else at that of its node."""

    name: str
    config: RouterConfig
    is_public: bool
    start_timeout_s: float
    source: str | None = None


@dataclass(frozen=True, slots=True)
class GatewaySpec:
    """The gateway, and the names of the routers behind it."""

    config: GatewayConfig
    routers: tuple[str, ...]

    @property
    def name(self) -> str:
        return GATEWAY


ProcessSpec = ControllerSpec | ExpertWorkerSpec | RouterSpec | GatewaySpec


def set_threads(spec: ProcessSpec, environment: MutableMapping[str, str]) -> None:
    """Bounds the CPU threads of this process. It has an effect only before torch is imported."""
    # Idle OpenMP threads that spin would starve the other processes of the node: those of a worker would hold
    # a core while the router begins its next layer. Spinning for some tens of microseconds bridges the gap
    # between the products of one pass.
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    environment["GOMP_SPINCOUNT"] = "2000"
    if (threads := _threads(spec)) is not None:
        environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(threads)


def _threads(spec: ProcessSpec) -> int | None:
    match spec:
        case ExpertWorkerSpec():
            return spec.config.settings.threads
        case RouterSpec():
            return spec.config.engine.threads
        case _:
            return None
