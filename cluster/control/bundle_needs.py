"""Which stored bundles are needed, and for what. The others can be forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.control.epochs_in_use import EpochsInUse
from moesaic.epoch import Epoch


@dataclass(frozen=True, slots=True)
class Need:
    """The most important epoch that has experts of a bundle, and what that epoch is for."""

    epoch: str
    role: str

    def __str__(self) -> str:
        return f"epoch {self.epoch}, {self.role}"


def bundle_needs(epochs: EpochsInUse) -> dict[bytes, Need]:
    """By the digest of the bundle."""
    needs: dict[bytes, Need] = {}
    for epoch, role in _needed(epochs):
        for bundle in epoch.bundles:
            needs.setdefault(bundle.digest, Need(epoch.id, role))
    return needs


def _needed(epochs: EpochsInUse) -> Iterator[tuple[Epoch, str]]:
    """The most important first. Earlier epochs than the one before are reached as long as their bundles are stored."""
    if epochs.current is not None:
        yield epochs.current, "which is current"
    if epochs.canary is not None:
        yield epochs.canary, "which is on trial"
    for epoch in epochs.living():
        yield epoch, "in which sequences still run"
    if epochs.previous is not None:
        yield epochs.previous, "to which a rollback goes back"
