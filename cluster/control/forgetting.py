"""Stored bundles are forgotten on an operator's word, when no epoch needs them that is in use or next to be.

What is decided is kept first, then the bundle loses its name at one moment, and its bytes go afterwards: a crash in between
leaves all of it or nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cluster.control.bundle_needs import bundle_needs
from cluster.control.bundle_store import BundleStore
from cluster.control.change import Changes
from cluster.control.epoch_store import Decision, EpochStore, go_on
from cluster.control.epochs_in_use import EpochsInUse
from cluster.control.reconciler import Reconciler
from moesaic.bundles import Bundle
from moesaic.errors import Aborted, FailedPrecondition, Unavailable

# The steps at which tests let it crash.
FAILPOINTS = ("forget.noted", "forget.withdrawn")


class Forgetting:
    """Forgets bundles."""

    def __init__(
        self,
        epochs: EpochsInUse,
        store: EpochStore,
        bundles: BundleStore,
        changes: Changes,
        reconciler: Reconciler,
        *,
        failpoints: Callable[[str], None] = go_on,
    ) -> None:
        self._epochs = epochs
        self._store = store
        self._bundles = bundles
        self._changes = changes
        self._reconciler = reconciler
        self._failpoints = failpoints

    async def forget(self, digest: bytes, operator: str) -> tuple[str, int]:
        """The name of the bundle, and the bytes that its weights gave back.

        Raises NotFound or FailedPrecondition with field `bundle`, Aborted while a change runs, and Unavailable as long as
        routers may still tell of an epoch that needs it.
        """
        bundle = await asyncio.to_thread(self._bundles.open, digest)
        name, num_bytes = bundle.manifest.name, bundle.num_bytes
        # From here to the new name without a pause, so that no change begins in between.
        self._check(bundle)
        detail = f"digest {digest.hex()[:12]}, {num_bytes / (1 << 20):.1f} MiB"
        self._store.note(Decision("forget", bundle=name, operator=operator, detail=detail))
        self._failpoints("forget.noted")
        leaving = self._bundles.withdraw(digest)
        self._failpoints("forget.withdrawn")
        await asyncio.to_thread(self._bundles.delete, leaving)
        return name, num_bytes

    def _check(self, bundle: Bundle) -> None:
        if self._changes.is_busy:
            raise Aborted(
                "a change runs, which may need the bundle: try again after it", reason="CHANGE_RUNNING"
            )
        if not self._reconciler.is_settled:
            raise Unavailable(
                "the controller has just started, and routers have not told yet which epochs they need",
                reason="NOT_SETTLED",
                retry_after_s=1.0,
            )
        need = bundle_needs(self._epochs).get(bundle.digest)
        if need is not None:
            raise FailedPrecondition(
                f"bundle: {bundle.manifest.name} is needed for {need}", field="bundle", reason="BUNDLE_NEEDED"
            )
