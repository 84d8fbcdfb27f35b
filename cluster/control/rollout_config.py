"""How the experts of a cluster may change: settings that were checked where the cluster was started."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cluster.control.golden_prompts import read_prompts
from moesaic.bundles import BaseModel
from moesaic.bundles.signature import read_signers
from moesaic.settings import RolloutSettings, Settings


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """What the controller is told of changes."""

    base: BaseModel
    # The folder of bundles and epochs, and whether it outlives the cluster.
    state: Path
    is_lasting: bool
    # Copies of every added expert.
    replicas: int
    # Public keys; empty: bundles need no signature.
    signers: frozenset[bytes] = frozenset()
    golden_prompts: tuple[str, ...] = ()
    settings: RolloutSettings = field(default_factory=RolloutSettings)

    @classmethod
    def of(cls, settings: Settings, base: BaseModel, temporary: Path) -> RolloutConfig:
        """`temporary` is the state folder where the settings name none.

        Raises InvalidArgument with field `signers` or `golden_prompts`.
        """
        state = settings.cluster.state
        return cls(
            base=base,
            state=temporary if state is None else Path(state).expanduser().resolve(),
            is_lasting=state is not None,
            replicas=settings.cluster.replicas,
            signers=read_signers(settings.cluster.signers),
            golden_prompts=_golden_prompts(settings),
            settings=settings.rollout,
        )

    @staticmethod
    def check(settings: Settings) -> None:
        """Reads the files that the settings name. Raises InvalidArgument with field `signers` or `golden_prompts`."""
        read_signers(settings.cluster.signers)
        _golden_prompts(settings)


def _golden_prompts(settings: Settings) -> tuple[str, ...]:
    prompts = settings.rollout.golden_prompts
    return () if prompts is None else read_prompts(Path(prompts))
