"""WorkerControlService: what the controller asks of one worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

import grpc

from expert_worker.compute.batcher import Batcher
from expert_worker.compute.probe import ProbeResult, any_rows, compare, probe
from expert_worker.experts.bundle_source import BundleSource
from expert_worker.experts.bundle_weights import read_probe
from expert_worker.experts.expert import ExpertForm
from expert_worker.experts.lifecycle import ExpertLifecycle
from expert_worker.experts.load_plan import find_expert, kind_of
from expert_worker.experts.store import ExpertStore
from moesaic.addresses import split_address
from moesaic.bundles import Bundle
from moesaic.epoch import DIGEST_BYTES, ExpertVersion, version_from_proto, version_to_proto
from moesaic.errors import InvalidArgument, Unavailable
from moesaic.families import MoeModel
from moesaic.v1 import expert_pb2, expert_pb2_grpc

RETRY_AFTER_S = 0.5


@dataclass(frozen=True, slots=True)
class Controlled:
    """What the service controls once the weights are loaded."""

    lifecycle: ExpertLifecycle
    store: ExpertStore
    batcher: Batcher
    model: MoeModel
    form: ExpertForm


class WorkerControlService(expert_pb2_grpc.WorkerControlServiceServicer):
    """The servicer of one worker. It answers Unavailable before `open`."""

    def __init__(self, bundles: BundleSource) -> None:
        self._bundles = bundles
        self._controlled: Controlled | None = None

    def add_to(self, server: grpc.aio.Server) -> None:
        expert_pb2_grpc.add_WorkerControlServiceServicer_to_server(self, server)

    def open(self, controlled: Controlled) -> None:
        """Starts to answer."""
        self._controlled = controlled

    def close(self) -> None:
        """Ends what loads."""
        if self._controlled is not None:
            self._controlled.lifecycle.close()
        self._bundles.close()

    async def Load(
        self, request: expert_pb2.LoadRequest, context: Any
    ) -> AsyncIterator[expert_pb2.LoadResponse]:
        lifecycle, versions = self._ready().lifecycle, _versions(request.experts)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(lifecycle.turn())
            bundle = await self._open(request, stack)
            steps = await stack.enter_async_context(aclosing(lifecycle.load(versions, bundle)))
            async for step in steps:
                yield expert_pb2.LoadResponse(
                    expert=version_to_proto(step.version),
                    loaded_bytes=step.loaded_bytes,
                    total_bytes=step.total_bytes,
                )

    async def Unload(self, request: expert_pb2.UnloadRequest, context: Any) -> expert_pb2.UnloadResponse:
        await self._ready().lifecycle.unload(_versions(request.experts))
        return expert_pb2.UnloadResponse()

    async def Probe(self, request: expert_pb2.ProbeRequest, context: Any) -> expert_pb2.ProbeResponse:
        controlled, versions = self._ready(), _versions(request.experts)
        async with AsyncExitStack() as stack:
            bundle = await self._open(request, stack)
            results = [await _probe(version, bundle, controlled) for version in versions]
        return expert_pb2.ProbeResponse(
            results=[
                expert_pb2.ProbeResult(
                    expert=version_to_proto(version),
                    ok=result.ok,
                    max_difference=result.max_difference,
                    max_expected=result.max_expected,
                )
                for version, result in zip(versions, results, strict=True)
            ]
        )

    async def _open(
        self, request: expert_pb2.LoadRequest | expert_pb2.ProbeRequest, stack: AsyncExitStack
    ) -> Bundle | None:
        """The bundle of a request, for as long as the stack is open; None where it is about the model's folder."""
        if not request.bundle:
            return None
        if len(request.bundle) != DIGEST_BYTES:
            raise InvalidArgument(f"bundle: must be a digest of {DIGEST_BYTES} bytes", field="bundle")
        if request.control_address:
            split_address(request.control_address, "control_address")
        opened = self._bundles.open(request.bundle, request.folder, request.control_address)
        return await stack.enter_async_context(opened)

    def _ready(self) -> Controlled:
        if self._controlled is None:
            raise Unavailable("the worker is loading", retry_after_s=RETRY_AFTER_S)
        return self._controlled


async def _probe(version: ExpertVersion, bundle: Bundle | None, controlled: Controlled) -> ProbeResult:
    """Of the model's own experts, which bring no answers, no more is asked than that theirs are finite.

    Raises FailedPrecondition for a version that is not held.
    """
    held = controlled.store.get(version.address, version.digest, field="experts")
    if bundle is None:
        answers = await probe(held, version.address.layer, any_rows(controlled.model), controlled.batcher)
        return compare(answers, answers, controlled.form)
    expert = find_expert(version, bundle)
    inputs, expected = await asyncio.to_thread(read_probe, bundle, expert)
    answers = await probe(held, version.address.layer, inputs, controlled.batcher)
    return compare(answers, expected, kind_of(expert, controlled.model).held_form(controlled.form))


def _versions(messages: Sequence[Any]) -> list[ExpertVersion]:
    """In the order of the request, each once. Raises InvalidArgument for none."""
    if not messages:
        raise InvalidArgument("experts: must not be empty", field="experts")
    return list(dict.fromkeys(map(version_from_proto, messages)))
