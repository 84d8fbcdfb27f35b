"""Looks at a running cluster as a whole: every router's and every worker's counters at one moment.

One router is known by its address; through its controller it leads to the others. A router whose workers were named by
hand has no controller: then it and the workers that it names are all there is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from moesaic import rpc
from moesaic.errors import Unavailable
from moesaic.v1 import (
    control_pb2,
    control_pb2_grpc,
    expert_pb2,
    expert_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

TIMEOUT_S = 2.0

_ROUTER = control_pb2.PROCESS_ROLE_ROUTER
_WORKER = control_pb2.PROCESS_ROLE_EXPERT_WORKER

_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class Member:
    """A router or a worker as its controller sees it; without a controller nothing is known of its state."""

    name: str
    address: str
    is_router: bool
    state: control_pb2.ProcessState = control_pb2.PROCESS_STATE_UNSPECIFIED
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Observation:
    """Counters by name, of those that answered. `at_s`: on the observer's clock."""

    at_s: float
    model: inference_pb2.GetModelInfoResponse
    members: tuple[Member, ...]
    routers: Mapping[str, inference_pb2.GetRouterStatsResponse]
    workers: Mapping[str, expert_pb2.GetWorkerStatsResponse]
    # What could not be seen, for a person to read; empty when all was.
    problem: str = ""


class Observer:
    """Use as an async context; keeps one channel to each process that it has met."""

    def __init__(self, target: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`target`: HOST:PORT of one router."""
        self._target = target
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
        """The cluster as it is now. Raises Unavailable when none of its routers answers."""
        model = await self._ask_model()
        topology = await self._ask_topology(model.control_address)
        if topology is not None:
            self._routers = _addresses(topology, _ROUTER) or self._routers
        at_s = self._clock()
        routers = await self._ask_all(self._routers, self._ask_router)
        workers = _named_workers(routers) if topology is None else _addresses(topology, _WORKER)
        return Observation(
            at_s=at_s,
            model=model,
            members=_known(self._routers, workers) if topology is None else _members(topology),
            routers=routers,
            workers=await self._ask_all(workers, self._ask_worker),
            problem=_missing(model, topology),
        )

    async def _ask_model(self) -> inference_pb2.GetModelInfoResponse:
        for address in dict.fromkeys((self._target, *self._routers.values())):
            stub = inference_pb2_grpc.InferenceServiceStub(self._channel(address))
            answer = await _unless_away(
                stub.GetModelInfo(inference_pb2.GetModelInfoRequest(), timeout=TIMEOUT_S)
            )
            if answer is not None:
                model: inference_pb2.GetModelInfoResponse = answer
                return model
        raise Unavailable(f"no router answers at {self._target}: is `moesaic serve` running?")

    async def _ask_topology(self, address: str) -> control_pb2.GetTopologyResponse | None:
        if not address:
            return None
        stub = control_pb2_grpc.ControlServiceStub(self._channel(address))
        return await _unless_away(stub.GetTopology(control_pb2.GetTopologyRequest(), timeout=TIMEOUT_S))

    async def _ask_router(self, address: str) -> inference_pb2.GetRouterStatsResponse | None:
        stub = inference_pb2_grpc.InferenceServiceStub(self._channel(address))
        return await _unless_away(
            stub.GetRouterStats(inference_pb2.GetRouterStatsRequest(), timeout=TIMEOUT_S)
        )

    async def _ask_worker(self, address: str) -> expert_pb2.GetWorkerStatsResponse | None:
        stub = expert_pb2_grpc.ExpertServiceStub(self._channel(address))
        return await _unless_away(stub.GetWorkerStats(expert_pb2.GetWorkerStatsRequest(), timeout=TIMEOUT_S))

    async def _ask_all(
        self, addresses: Mapping[str, str], ask: Callable[[str], Coroutine[Any, Any, _R | None]]
    ) -> dict[str, _R]:
        answers = await asyncio.gather(*(ask(address) for address in addresses.values()))
        return {name: answer for name, answer in zip(addresses, answers, strict=True) if answer is not None}

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = rpc.aio_channel(address)
        return self._channels[address]


async def _unless_away(call: Awaitable[_R]) -> _R | None:
    """The answer of a call, None when there is none."""
    try:
        return await call
    except grpc.aio.AioRpcError:
        return None


def _members(topology: control_pb2.GetTopologyResponse) -> tuple[Member, ...]:
    return tuple(
        Member(process.name, process.address, process.role == _ROUTER, process.state, process.detail)
        for process in topology.processes
        if process.role in (_ROUTER, _WORKER)
    )


def _known(routers: Mapping[str, str], workers: Mapping[str, str]) -> tuple[Member, ...]:
    """Members of whom only the addresses are known."""
    return (
        *(Member(name, address, is_router=True) for name, address in routers.items()),
        *(Member(name, address, is_router=False) for name, address in workers.items()),
    )


def _addresses(topology: control_pb2.GetTopologyResponse, role: control_pb2.ProcessRole) -> dict[str, str]:
    return {
        process.name: process.address
        for process in topology.processes
        if process.role == role and process.address
    }


def _named_workers(routers: Mapping[str, inference_pb2.GetRouterStatsResponse]) -> dict[str, str]:
    """The workers that the routers talk to."""
    return {
        traffic.worker: traffic.address
        for router in routers.values()
        for traffic in router.workers
        if traffic.worker and traffic.address
    }


def _missing(
    model: inference_pb2.GetModelInfoResponse, topology: control_pb2.GetTopologyResponse | None
) -> str:
    if topology is not None or not model.control_address:
        return ""
    return f"the controller at {model.control_address} does not answer"
