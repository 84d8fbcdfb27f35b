"""The folder that a conversion writes.

Files appear in it whole or not at all, so that a killed run can be resumed. A mark identifies the source.
config.json is written last: without it, the folder is not recognised as a model.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cluster.checkpoints.conversion_plan import PlannedTensor, Shard, index_of
from cluster.terminal.tables import size
from moesaic.checkpoints.checkpoint import CONFIG_FILE, INDEX_FILE
from moesaic.checkpoints.mistral_params import PARAMS_FILE
from moesaic.checkpoints.safetensors_file import read_header, read_json
from moesaic.errors import CheckpointError, InvalidArgument

MARK_FILE = "moesaic_conversion.json"
# The files of a model besides its weights and config. params.json is kept because it implies Mistral's chat
# format.
COMPANIONS = (
    PARAMS_FILE, "*.model", "*.model.v*", "tekken.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_PART_SUFFIX = ".part"
# The space for headers, index and companions.
_SLACK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class ConversionFolder:
    """`mark` identifies the source; a folder with another mark is refused."""

    path: Path
    mark: dict[str, Any]
    shards: tuple[Shard, ...]
    companions: tuple[Path, ...]

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Creates the folder or resumes one. Raises InvalidArgument where it can do neither."""
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise _bad("another conversion is writing it") from error
            self._check_owner()
            yield
        finally:
            os.close(handle)

    def missing(self) -> tuple[Shard, ...]:
        """The absent or incomplete shards. Raises InvalidArgument where the disk has no room for them."""
        missing = tuple(shard for shard in self.shards if not self._is_whole(shard))
        needed = sum(shard.num_bytes for shard in missing) + _SLACK_BYTES
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise _bad(f"needs {size(needed)} of disk, {size(free)} are free")
        return missing

    def write_shard(
        self, shard: Shard, read: Callable[[PlannedTensor], memoryview], wrote: Callable[[int], None]
    ) -> None:
        """Writes tensor by tensor, so that memory holds one of them. Calls `wrote` with the bytes of each."""
        with self._whole_file(shard.file) as file:
            file.write(shard.head())
            for tensor in shard.tensors:
                file.write(read(tensor))
                wrote(tensor.num_bytes)

    def finish(self, config: dict[str, Any]) -> None:
        """Writes the shard index, the companions, and then the config."""
        if len(self.shards) > 1:
            self._write_json(INDEX_FILE, index_of(self.shards))
        for companion in self.companions:
            with companion.open("rb") as source, self._whole_file(companion.name) as file:
                shutil.copyfileobj(source, file)
        self._write_json(CONFIG_FILE, config)

    def _check_owner(self) -> None:
        names = {path.name for path in self.path.iterdir()}
        own = {MARK_FILE, CONFIG_FILE, INDEX_FILE}.union(
            (shard.file for shard in self.shards), (path.name for path in self.companions)
        )
        own |= {name + _PART_SUFFIX for name in own}
        if MARK_FILE in names:
            if read_json(self.path / MARK_FILE) != self.mark:
                raise _bad("holds a conversion of another model, or with shards of another size")
        elif names:
            raise _bad("is not empty")
        if foreign := sorted(names - own):
            raise _bad(f"holds {foreign[0][:64]!r}, which is no part of this conversion")
        self._write_json(MARK_FILE, self.mark)

    def _is_whole(self, shard: Shard) -> bool:
        """Checks the header alone, because a file gets its name only once all of it is on disk."""
        path = self.path / shard.file
        if not path.exists():
            return False
        try:
            found = read_header(path)
        except CheckpointError:
            return False
        return {name: (entry.dtype, entry.shape) for name, entry in found.items()} == {
            tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors
        }

    def _write_json(self, name: str, content: object) -> None:
        with self._whole_file(name) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")

    @contextlib.contextmanager
    def _whole_file(self, name: str) -> Iterator[BinaryIO]:
        """A file that gets its name once its content is on disk."""
        part = self.path / (name + _PART_SUFFIX)
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path / name)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def find_companions(folder: Path) -> tuple[Path, ...]:
    found: Iterable[Path] = (path for pattern in COMPANIONS for path in folder.glob(pattern))
    return tuple(sorted(path for path in found if path.is_file()))


def _bad(problem: str) -> InvalidArgument:
    return InvalidArgument(f"out: {problem}", field="out")
