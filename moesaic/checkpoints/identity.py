"""Whether two hosts have the same model in their folders, told within a moment, before any weights are loaded.

`serve` states the identity of the folder that it has checked, and every process compares its own host's with it.
The headers give every tensor's name, type, shape, file and place, and with them the size of each file. Files that
agree in all of this may still be of another training: so a few bytes of the tensors count as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.checkpoints.safetensors_file import TensorEntry
from moesaic.errors import CheckpointError

# So many tensors are sampled at most, at even distances; a model that was trained further differs in nearly all.
MAX_SAMPLED_TENSORS = 4096
SAMPLE_BYTES = 64
# The files beside the weights that decide what a router makes of text.
TEXT_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)


@dataclass(frozen=True, slots=True)
class FolderIdentity:
    """Digests of a model folder. Two folders with the same ones hold the same model."""

    config: str
    tensors: str
    weights: str
    text: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> FolderIdentity:
        """Raises CheckpointError when a file cannot be read."""
        entries = sorted(checkpoint.tensors.values(), key=lambda entry: (entry.file.name, entry.first_byte))
        try:
            return cls(
                config=_digest([json.dumps(checkpoint.config, sort_keys=True).encode()]),
                tensors=_digest(repr(_place(entry)).encode() for entry in entries),
                weights=_digest(_samples(entries)),
                text=_digest(_text(checkpoint)),
            )
        except OSError as error:
            raise CheckpointError(f"model: cannot be read: {error.strerror}", field="model") from error

    @property
    def fingerprint(self) -> bytes:
        """32 bytes that stand for config and weights, by which bundles and epochs name their base model."""
        return hashlib.sha256(f"{self.config}\0{self.tensors}\0{self.weights}".encode()).digest()


def check_identity(checkpoint: Checkpoint, wanted: FolderIdentity | None, *, text: bool = False) -> None:
    """Raises CheckpointError if the folder is not the wanted one. Files of the text count only with `text`."""
    if wanted is None:
        return
    found = FolderIdentity.of(checkpoint)
    differing = [
        field.name
        for field in fields(FolderIdentity)
        if getattr(found, field.name) != getattr(wanted, field.name) and (text or field.name != "text")
    ]
    if differing:
        raise CheckpointError(
            f"model: the folder of this node is not the one that was checked where serve was started: "
            f"they differ in {' and '.join(differing)}",
            field="model",
            reason="OTHER_MODEL",
        )


def _place(entry: TensorEntry) -> tuple[object, ...]:
    return entry.name, entry.dtype, entry.shape, entry.file.name, entry.first_byte, entry.num_bytes


def _samples(entries: Sequence[TensorEntry]) -> Iterable[bytes]:
    """Bytes from the middle of tensors at even distances. `entries` are ordered by file."""
    step = -(-len(entries) // MAX_SAMPLED_TENSORS) or 1
    for file, of_file in groupby(entries[::step], key=lambda entry: entry.file):
        with file.open("rb", buffering=0) as weights:
            for entry in of_file:
                length = min(SAMPLE_BYTES, entry.num_bytes)
                weights.seek(entry.first_byte + (entry.num_bytes - length) // 2)
                yield weights.read(length)


def _text(checkpoint: Checkpoint) -> Iterable[bytes]:
    for name in TEXT_FILES:
        file = checkpoint.folder / name
        if file.is_file():
            yield name.encode()
            yield file.read_bytes()


def _digest(parts: Iterable[bytes]) -> str:
    """Of all parts, each with its length, so that none can pass for two."""
    content = hashlib.sha256()
    for part in parts:
        content.update(len(part).to_bytes(8, "little"))
        content.update(part)
    return content.hexdigest()
