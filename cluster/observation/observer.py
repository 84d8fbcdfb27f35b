"""The counters of every router and worker of a running cluster, read at one moment.

One router is known by its address; its controller knows the other processes. A router whose workers were
named by hand has no controller: the observation then covers that router and the workers that it names.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from cluster.observation.reachability import hinting_at_serve
from moesaic import rpc
from moesaic.client.call_failure import explain
from moesaic.errors import MoesaicError
from moesaic.v1 import (
    control_pb2,
    control_pb2_grpc,
    expert_pb2,
    expert_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

TIMEOUT_S = 2.0
# Shorter than what a person waits for: the routers' view is shown without the controller's.
CONTROLLER_TIMEOUT_S = 1.5

_ROUTER = control_pb2.PROCESS_ROLE_ROUTER
_WORKER = control_pb2.PROCESS_ROLE_EXPERT_WORKER

_Model = inference_pb2.GetModelInfoResponse
_RouterStats = inference_pb2.GetRouterStatsResponse
_WorkerStats = expert_pb2.GetWorkerStatsResponse
_Topology = control_pb2.GetTopologyResponse
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class ObservedProcess:
    """A router or a worker as its controller sees it. Without a controller its state is not known."""

    name: str
    address: str
    is_router: bool
    state: control_pb2.ProcessState = control_pb2.PROCESS_STATE_UNSPECIFIED
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Observation:
    """Reports of the processes, by name. A process that did not answer has no counters."""

    # On the observer's clock.
    at_s: float
    model: _Model
    processes: tuple[ObservedProcess, ...]
    routers: Mapping[str, _RouterStats]
    workers: Mapping[str, _WorkerStats]
    # The counters of the router that was asked for the model.
    entry: _RouterStats = field(default_factory=_RouterStats)
    # The controller's view; None without a controller that answers.
    topology: _Topology | None = None
    # A sentence for a person about what could not be observed; empty when nothing is missing.
    problem: str = ""


class Observer:
    """An async context. It keeps one channel to each process that it has asked."""

    def __init__(
        self, target: str, *, timeout_s: float = TIMEOUT_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`target`: HOST:PORT of one router. `timeout_s`: the deadline of each question to one process."""
        self._target = target
        self._timeout_s = timeout_s
        self._clock = clock
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._routers = {"router": target}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    async def observe(self) -> Observation:
        """The cluster as it is now. Raises the target's MoesaicError when no known router answers."""
        seen = await self.observe_routers()
        workers = {process.name: process.address for process in seen.processes if not process.is_router}
        return replace(seen, workers=await self._ask_all(workers, self._ask_worker))

    async def observe_routers(self) -> Observation:
        """The same without the workers' counters: no worker is asked, so none can delay the result."""
        model, entry = await self._ask_entry()
        topology = await self._ask_topology(model.control_address)
        if topology is not None:
            self._routers = _router_addresses(topology) or self._routers
        at_s = self._clock()
        routers = await self._ask_all(self._routers, self._ask_router)
        return Observation(
            at_s=at_s,
            model=model,
            processes=_known(self._routers, routers) if topology is None else _observed(topology),
            routers=routers,
            workers={},
            entry=entry,
            topology=topology,
            problem=_missing(model, topology),
        )

    async def _ask_entry(self) -> tuple[_Model, _RouterStats]:
        """Model and counters from the target, or from the first other router that answers in its place."""
        failure: MoesaicError | None = None
        for address in dict.fromkeys((self._target, *self._routers.values())):
            try:
                with hinting_at_serve():
                    return await self._ask_entry_at(address)
            except MoesaicError as error:
                failure = failure or error
        assert failure is not None
        raise failure

    async def _ask_entry_at(self, address: str) -> tuple[_Model, _RouterStats]:
        """Raises MoesaicError."""
        router = self._router(address)
        try:
            request = inference_pb2.GetModelInfoRequest()
            model = rpc.received(await router.GetModelInfo(request, timeout=self._timeout_s))
            return model, rpc.received(await self._stats(router))
        except grpc.aio.AioRpcError as error:
            raise explain(error, address, timeout_s=self._timeout_s) from error

    async def _ask_topology(self, address: str) -> _Topology | None:
        return await ask_topology(self._channel(address), CONTROLLER_TIMEOUT_S) if address else None

    async def _ask_router(self, address: str) -> _RouterStats | None:
        return await _answer_or_none(self._stats(self._router(address)))

    async def _ask_worker(self, address: str) -> _WorkerStats | None:
        if not address:
            return None
        stub = expert_pb2_grpc.ExpertServiceStub(self._channel(address))
        return await _answer_or_none(
            stub.GetWorkerStats(expert_pb2.GetWorkerStatsRequest(), timeout=self._timeout_s)
        )

    async def _ask_all(
        self, addresses: Mapping[str, str], ask: Callable[[str], Coroutine[Any, Any, _R | None]]
    ) -> dict[str, _R]:
        answers = await asyncio.gather(*(ask(address) for address in addresses.values()))
        return {name: answer for name, answer in zip(addresses, answers, strict=True) if answer is not None}

    def _router(self, address: str) -> inference_pb2_grpc.InferenceServiceStub:
        return inference_pb2_grpc.InferenceServiceStub(self._channel(address))

    def _stats(self, router: inference_pb2_grpc.InferenceServiceStub) -> Awaitable[_RouterStats]:
        call: Awaitable[_RouterStats] = router.GetRouterStats(
            inference_pb2.GetRouterStatsRequest(), timeout=self._timeout_s
        )
        return call

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = rpc.aio_channel(address)
        return self._channels[address]


async def ask_topology(channel: grpc.aio.Channel, timeout_s: float) -> _Topology | None:
    """The view of the controller behind `channel`; None when it does not answer."""
    stub = control_pb2_grpc.ControlServiceStub(channel)
    return await _answer_or_none(stub.GetTopology(control_pb2.GetTopologyRequest(), timeout=timeout_s))


async def _answer_or_none(call: Awaitable[_R]) -> _R | None:
    try:
        return await call
    except grpc.aio.AioRpcError:
        return None


def _observed(topology: _Topology) -> tuple[ObservedProcess, ...]:
    return tuple(
        ObservedProcess(process.name, process.address, process.role == _ROUTER, process.state, process.detail)
        for process in topology.processes
        if process.role in (_ROUTER, _WORKER)
    )


def _known(addresses: Mapping[str, str], routers: Mapping[str, _RouterStats]) -> tuple[ObservedProcess, ...]:
    """Without a controller: the known routers, and the workers that they talk to.

    People may give two workers one name; such names are completed by the address.
    """
    workers = {
        traffic.address: traffic.worker
        for router in routers.values()
        for traffic in router.workers
        if traffic.worker and traffic.address
    }
    times = Counter(workers.values())
    return (
        *(ObservedProcess(name, address, is_router=True) for name, address in addresses.items()),
        *(
            ObservedProcess(name if times[name] == 1 else f"{name} {address}", address, is_router=False)
            for address, name in workers.items()
        ),
    )


def _router_addresses(topology: _Topology) -> dict[str, str]:
    return {
        process.name: process.address
        for process in topology.processes
        if process.role == _ROUTER and process.address
    }


def _missing(model: _Model, topology: _Topology | None) -> str:
    if topology is not None or not model.control_address:
        return ""
    return f"the controller at {model.control_address} does not answer, and serving goes on"
