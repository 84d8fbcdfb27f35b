"""What a kind of expert is. docs/expert-kinds.md shows how a package brings one of its own.

Shapes: D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

from torch import Tensor

from expert_worker.experts.expert import Expert, ExpertForm, ExpertWeights
from expert_worker.experts.expert_reader import Scratch
from expert_worker.experts.stack import Place
from moesaic.bundles.manifest import BundleExpert
from moesaic.families.model import ExpertModule


@dataclass(frozen=True, slots=True)
class Weight:
    """What a tensor of a bundle must be: its shape, and the dtypes that it may have, as safetensors spells them."""

    shape: tuple[int, ...]
    dtypes: frozenset[str] = frozenset({"F32", "BF16", "F16"})


class WeightSource(Protocol):
    """The weights of one expert, by the names that its kind gives them. What is read is what the manifest promises,
    to the byte, and finite: else the read raises DataLoss or CheckpointError."""

    @property
    def scratch(self) -> Scratch:
        """Memory that a thread may use again and again while it makes the experts of a request."""
        ...

    def read(self, names: Sequence[str], weights: Tensor, biases: Tensor | None) -> None:
        """Fills equal runs of rows of `weights`, and of `biases`, with the weights of these names."""
        ...

    def tensor(self, name: str) -> Tensor:
        """A weight on the host, in the dtype and shape in which it is stored."""
        ...

    def base_weights(self, slot: int, version: bytes) -> ExpertWeights:
        """The weights of a slot of the model's folder in this layer, on the host and in float32.

        Raises FailedPrecondition if their version is another one."""
        ...


class ExpertKind(Protocol):
    """The experts of one kind that share some parameters. No method but `build` reads anything.

    Every method may raise InvalidArgument, which names the parameter at fault.
    """

    name: ClassVar[str]

    @classmethod
    def of(cls, expert: BundleExpert, base: ExpertModule) -> Self:
        """The kind of this expert, by its parameters. `base` describes the model's own experts in the layer."""
        ...

    @property
    def module(self) -> ExpertModule | None:
        """The MLP that the expert is when it is built, so that it may lie in a stack with others; None for
        anything else."""
        ...

    @property
    def weights(self) -> Mapping[str, Weight]:
        """The tensors of such an expert, by the kind's names for them."""
        ...

    def held_form(self, form: ExpertForm) -> ExpertForm:
        """The form in which a worker whose form is `form` holds such an expert. It says how exact the answers are."""
        ...

    def held_bytes(self, form: ExpertForm) -> int:
        """The memory of such an expert on a worker of this form."""
        ...

    def build(self, source: WeightSource, form: ExpertForm, place: Place) -> Expert:
        """Reads the weights and makes the expert. A kind without a module ignores the place."""
        ...
