"""The experts that a worker keeps in shared memory, by the digest of their version."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from expert_worker.experts.expert import Expert, ExpertForm, MlpExpert
from expert_worker.experts.kept.expert_file import ExpertFile, map_expert
from expert_worker.experts.store import HeldExpert
from moesaic.compute.tensor_bytes import probe_layout
from moesaic.epoch import ExpertAddress
from moesaic.errors import DataLoss
from moesaic.kept_folder import KeptFolder, NoRoom

log = logging.getLogger(__name__)

# To be raised with every change of how weights are laid out, quantised, or written to files.
_LAYOUT = 1


@dataclass(slots=True)
class KeptExperts:
    """Finds experts that an earlier worker has left, and keeps those that this one makes. Methods may be called from
    any thread."""

    folder: KeptFolder
    form: ExpertForm
    # What is known of the model's own experts before anything is read.
    versions: Mapping[ExpertAddress, bytes] = field(default_factory=dict)
    # How many of the model's own experts were found.
    found: int = 0
    _full: bool = False

    def find_base(self, address: ExpertAddress) -> HeldExpert | None:
        """An expert of the model's folder."""
        version = self.versions.get(address)
        expert = None if version is None else self.find(version)
        if version is None or expert is None:
            return None
        self.found += 1
        return HeldExpert(version, expert)

    def find(self, version: bytes) -> MlpExpert | None:
        """The expert with this digest in the form of this worker; None if it is not there, or is damaged."""
        name = self._name(version)
        path = self.folder.find(name)
        if path is None:
            return None
        try:
            return map_expert(path, self.form)
        except DataLoss as error:
            log.warning("a kept expert is of no use", extra={"fields": {"why": error.message}})
            self.folder.discard(name)
            return None

    def keep(self, version: bytes, expert: Expert) -> Expert:
        """The expert, from now on in shared memory; as it is where there is no room, or its kind cannot be kept."""
        if not isinstance(expert, MlpExpert) or expert.module is None or expert.row is not None:
            return expert
        name = self._name(version)
        file = ExpertFile.of(name, expert, expert.module)
        try:
            self.folder.write(name, file.parts(), file.num_bytes)
        except NoRoom as error:
            self._say_full(error)
            return expert
        return self.find(version) or expert

    def drop(self, version: bytes) -> None:
        """Gives an expert up that is not held any more."""
        self.folder.drop(self._name(version))

    def _name(self, version: bytes) -> str:
        return f"{version.hex()}.{form_digest(self.form)}"

    def _say_full(self, error: NoRoom) -> None:
        if not self._full:
            self._full = True
            log.warning(
                "no room to keep weights beyond this process, so its successor will read some from the disk",
                extra={"fields": {"why": str(error)}},
            )


def form_digest(form: ExpertForm) -> str:
    """What decides whether weights that are laid out by one process can be computed by another one."""
    facts = (
        *(_LAYOUT, torch.__version__, torch.backends.cpu.get_cpu_capability(), probe_layout()),
        *(form.dtype, form.weights),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
