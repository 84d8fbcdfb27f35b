"""What a drill asks of the controller: to change the experts of the built-in model, and which it has now."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from cluster.bundles import demo_bundles
from cluster.bundles.controller_client import (
    CarriedOut,
    ControllerClient,
    controller_client,
    find_controller,
)
from cluster.drill.experts import Bundle, Change, Experts, Verb
from cluster.drill.faults import Stage
from moesaic.bundles import open_bundle
from moesaic.errors import FailedPrecondition, MoesaicError, Unavailable
from moesaic.v1 import control_pb2

# Of the requests, for an epoch on trial.
TRIAL_SHARE = 0.5
# How long a controller that was killed may take until it says what the model is.
ANSWERS_S = 30.0
PERIOD_S = 0.1
_KINDS = {
    Verb.ADD: control_pb2.CHANGE_KIND_ADD,
    Verb.SWAP: control_pb2.CHANGE_KIND_SWAP,
    Verb.PROMOTE: control_pb2.CHANGE_KIND_PROMOTE,
    Verb.ROLLBACK: control_pb2.CHANGE_KIND_ROLLBACK,
    Verb.REMOVE: control_pb2.CHANGE_KIND_REMOVE,
}
# What comes later is not told: by then every router has the change.
_STAGES = {
    control_pb2.CHANGE_STAGE_VERIFY: Stage.VERIFY,
    control_pb2.CHANGE_STAGE_LOAD: Stage.LOAD,
    control_pb2.CHANGE_STAGE_PROBE: Stage.PROBE,
    control_pb2.CHANGE_STAGE_PUBLISH: Stage.PUBLISH,
    control_pb2.CHANGE_STAGE_COMMIT: Stage.COMMIT,
}


class ExpertControl:
    """The controller that a router follows; found anew for each question, as it may have been killed."""

    def __init__(self, router: str, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._router = router
        self._sleep = sleep
        self._digests: dict[Bundle, bytes] = {}
        self._epochs: dict[str, Bundle] = {}

    async def prepare(self) -> None:
        """Stores the bundles. Raises FailedPrecondition where the model is another one, or not as it was served."""
        async with self._controller() as controller:
            history = await controller.history(limit=1)
            if history.canary:
                raise FailedPrecondition("fault: swap cannot begin while an epoch is on trial", field="fault")
            self._epochs[history.epoch] = Bundle.NONE
            for bundle in (Bundle.FIRST, Bundle.BETTER):
                opened = await asyncio.to_thread(open_bundle, demo_bundles.BUNDLES / bundle)
                self._digests[bundle] = opened.digest
                try:
                    await controller.upload(opened)
                except MoesaicError as error:
                    raise FailedPrecondition(
                        f"fault: swap changes experts of the built-in model: {error.message}", field="fault"
                    ) from error

    async def carry_out(
        self, change: Change, reach: Callable[[Stage], None] = lambda stage: None
    ) -> CarriedOut:
        """Returns once every router has the change. `reach`: how far it is. Raises MoesaicError."""
        async with self._controller() as controller:
            return await controller.carry_out(
                self._request(change), lambda step: reach(_STAGES.get(step.stage, Stage.SPREAD))
            )

    async def learn(self, change: Change) -> None:
        """Carries a change out whose epoch is not known yet. Raises MoesaicError."""
        done = await self.carry_out(change)
        if self._epochs.setdefault(done.epoch, change.after.current) is not change.after.current:
            raise Unavailable(f"epoch {done.epoch} is two models")

    async def look(self) -> Experts | None:
        """What the model is; None where an epoch is in use that no change was to make, or where nobody says."""
        history = await self._history()
        if history is None or history.epoch not in self._epochs:
            return None
        current = self._epochs[history.epoch]
        if not history.canary:
            return Experts(current)
        trial = self._epochs.get(history.canary)
        return None if trial is None else Experts(current, trial)

    async def _history(self) -> control_pb2.GetHistoryResponse | None:
        for _ in range(int(ANSWERS_S / PERIOD_S)):
            with contextlib.suppress(MoesaicError):
                async with self._controller() as controller:
                    return await controller.history(limit=1)
            await self._sleep(PERIOD_S)
        return None

    def _request(self, change: Change) -> control_pb2.ChangeRequest:
        request = control_pb2.ChangeRequest(operator="moesaic drill")
        match change.verb:
            case Verb.CANARY:
                adds = change.bundle is Bundle.FIRST
                request.kind = _KINDS[Verb.ADD if adds else Verb.SWAP]
                request.bundle = self._digests[change.bundle]
                request.canary, request.share = True, TRIAL_SHARE
            case Verb.ADD | Verb.SWAP:
                request.kind, request.bundle = _KINDS[change.verb], self._digests[change.bundle]
            case Verb.REMOVE:
                request.kind, request.name = _KINDS[change.verb], change.bundle
            case Verb.PROMOTE | Verb.ROLLBACK:
                request.kind = _KINDS[change.verb]
                request.epoch = next(id_ for id_, held in self._epochs.items() if held is change.bundle)
        return request

    @contextlib.asynccontextmanager
    async def _controller(self) -> AsyncIterator[ControllerClient]:
        async with controller_client(await find_controller(self._router)) as controller:
            yield controller
