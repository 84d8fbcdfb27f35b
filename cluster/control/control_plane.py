"""The control plane of one cluster, put together: what is kept on disk, the controller, and the loops that change things."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

from cluster.control.bundle_store import BundleStore
from cluster.control.canary_watch import CanaryWatch, MeasureDrift
from cluster.control.change import Changes
from cluster.control.controller import Cluster, Controller, ProcessObserver
from cluster.control.epoch_store import EpochStore, go_on
from cluster.control.epochs_in_use import MARGIN_S, EpochsInUse
from cluster.control.forgetting import Forgetting
from cluster.control.golden_prompts import measure_drift
from cluster.control.reconciler import SETTLE_S, Reconciler
from cluster.control.rollout_config import RolloutConfig
from cluster.control.router_reports import RouterReports
from cluster.control.state_lock import StateLock
from cluster.control.worker_calls import GrpcWorkerCalls, WorkerCalls
from moesaic.bundles import Bundle, verify
from moesaic.bundles.signature import check_signature
from moesaic.v1 import control_pb2

BUNDLES_FOLDER = "bundles"


class ControlPlane:
    """`run` is its loop. `close` gives the state folder back."""

    def __init__(
        self,
        cluster: Cluster,
        config: RolloutConfig,
        observer: ProcessObserver,
        *,
        calls: WorkerCalls | None = None,
        first_revision: int = 0,
        settle_s: float = SETTLE_S,
        failpoints: Callable[[str], None] = go_on,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises FailedPrecondition with field `state`."""
        settings = config.settings
        # HOST:PORT of the server that serves FetchBundle; known once it listens.
        self.address = ""
        self._clock = clock
        self._lock = StateLock(config.state)
        try:
            self.store = EpochStore(
                config.state, model=cluster.model, base=config.base.fingerprint, failpoints=failpoints
            )
            self.bundles = BundleStore(
                config.state / BUNDLES_FOLDER,
                partial(_check_bundle, config),
                max_bytes=settings.max_bundle_mib << 20,
                failpoints=failpoints,
            )
        except BaseException:
            self._lock.close()
            raise
        self.epochs = EpochsInUse(self.store, drain_s=settings.drain_s)
        self.reports = RouterReports()
        self.controller = Controller(
            cluster, observer, self.epochs, first_revision=first_revision, clock=clock
        )
        self.reconciler = Reconciler(
            self.controller,
            self.epochs,
            self.bundles,
            self.reports,
            calls
            or GrpcWorkerCalls(self.bundles, lambda: self.address, load_timeout_s=settings.load_timeout_s),
            config.base,
            replicas=config.replicas,
            load_timeout_s=settings.load_timeout_s,
            settle_s=settle_s,
            failpoints=failpoints,
            clock=clock,
        )
        self.changes = Changes(
            self.controller,
            self.epochs,
            self.store,
            self.bundles,
            self.reconciler,
            self.reports,
            config.base,
            is_lasting=config.is_lasting,
            clock=clock,
        )
        self.forgetting = Forgetting(
            self.epochs, self.store, self.bundles, self.changes, self.reconciler, failpoints=failpoints
        )
        self.canary_watch = CanaryWatch(
            self.epochs, self.reports, self.changes, settings, _drift_of(config.golden_prompts), clock=clock
        )

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.controller.run())
                group.create_task(self.reconciler.run())
                group.create_task(self.canary_watch.run())
        finally:
            await self.changes.stop()

    def hear(self, report: control_pb2.ReportEpochsRequest) -> None:
        """A router reports. Epochs that it still needs live again, if this controller did not know of them."""
        now_s = self._clock()
        self.reports.hear(report, now_s)
        self.reports.forget_before(now_s - self.epochs.drain_s - MARGIN_S)
        before = self.epochs.living()
        self.epochs.note_pinned(self.reports.pinned(), now_s)
        if self.epochs.living() != before:
            self.controller.publish()

    def close(self) -> None:
        self.store.close()
        self._lock.close()


def _check_bundle(config: RolloutConfig, bundle: Bundle) -> None:
    """The signature first: nothing of a stranger's weights is read."""
    check_signature(bundle, config.signers)
    verify(bundle, base=config.base)


def _drift_of(prompts: tuple[str, ...]) -> MeasureDrift | None:
    return (lambda router, epochs: measure_drift(router, prompts, epochs)) if prompts else None
