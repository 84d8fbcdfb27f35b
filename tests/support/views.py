"""Views of the model for tests that have an epoch and no model folder."""

from __future__ import annotations

from moesaic.epoch import Epoch
from router.gating.model_view import ModelView, ViewRows


def plain_view(epoch: Epoch, key: str | None = None) -> ModelView:
    """An epoch as it is, with the gates of the folder."""
    versions: dict[int, dict[int, bytes]] = {}
    for (layer, slot), digest in epoch.versions.items():
        versions.setdefault(layer, {})[slot] = digest
    return ModelView(epoch, key or epoch.id, versions, {})


def whole(epoch: Epoch) -> tuple[ViewRows, ...]:
    """All rows of a micro-batch in one epoch."""
    return (ViewRows(plain_view(epoch), 0, 0),)
