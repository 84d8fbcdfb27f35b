"""The folder of an expert bundle: opened, and written."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from moesaic.bundles.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    SIGNATURE_FILE,
    WEIGHTS_FILE,
    BundleExpert,
    Manifest,
    TensorFacts,
)
from moesaic.bundles.refusal import refuse
from moesaic.bundles.version import expert_version
from moesaic.checkpoints.safetensors_file import DTYPE_BYTES, TensorEntry, read_header
from moesaic.errors import CheckpointError, InvalidArgument

MAX_SIGNATURE_BYTES = 1 << 16
_BYTES_AT_ONCE = 1 << 22
_FILES = frozenset({MANIFEST_FILE, WEIGHTS_FILE, SIGNATURE_FILE})
# How the files of Python's and torch's pickles begin.
_PICKLE_STARTS = (b"\x80", b"PK\x03\x04")

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Bundle:
    """An open bundle. Its header is checked, its weights are not: see `verify`."""

    folder: Path
    manifest: Manifest
    # The files as they are.
    manifest_bytes: bytes
    signature_bytes: bytes | None
    tensors: Mapping[str, TensorEntry]

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for all of the bundle."""
        return hashlib.sha256(self.manifest_bytes).digest()

    @property
    def weights_file(self) -> Path:
        return self.folder / WEIGHTS_FILE

    @property
    def num_bytes(self) -> int:
        """The size of the file of weights."""
        return self.weights_file.stat().st_size

    def pieces(self, tensor: str) -> Iterator[bytes]:
        """The bytes of a tensor, some MiB at a time. Raises InvalidArgument where the file was cut since."""
        entry = self.tensors[tensor]
        left = entry.num_bytes
        with entry.file.open("rb") as file:
            file.seek(entry.first_byte)
            while left:
                piece = file.read(min(left, _BYTES_AT_ONCE))
                if not piece:
                    refuse("WEIGHTS", WEIGHTS_FILE, f"tensor {tensor} is cut off")
                left -= len(piece)
                yield piece

    def read(self, tensor: str) -> bytes:
        """The little-endian bytes of a tensor."""
        return b"".join(self.pieces(tensor))

    def floats(self, tensor: str) -> Floats:
        """A tensor of floats as float32, in its shape."""
        entry = self.tensors[tensor]
        return to_float32(self.read(tensor), entry.dtype).reshape(entry.shape)


def to_float32(data: bytes, dtype: str) -> Floats:
    """Little-endian F32, BF16 or F16 as float32, in one dimension."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def open_bundle(folder: str | Path) -> Bundle:
    """Reads manifest.json and the header of the weights. Raises InvalidArgument with field `bundle`."""
    folder = Path(folder)
    try:
        _check_files(folder)
        content = (folder / MANIFEST_FILE).read_bytes()
        signature = folder / SIGNATURE_FILE
        signed = signature.read_bytes() if signature.is_file() else None
        return Bundle(folder, Manifest.from_json(content), content, signed, _read_weights(folder))
    except OSError as error:
        refuse("FILES", "the folder", f"cannot be read: {error.strerror}")


def _read_weights(folder: Path) -> dict[str, TensorEntry]:
    with (folder / WEIGHTS_FILE).open("rb") as file:
        if file.read(4).startswith(_PICKLE_STARTS) and not _is_header_length(folder / WEIGHTS_FILE):
            refuse("PICKLE", WEIGHTS_FILE, "is a pickle, which is never read")
    try:
        return read_header(folder / WEIGHTS_FILE)
    except CheckpointError as error:
        raise InvalidArgument(f"bundle: {error.message}", field="bundle", reason="BUNDLE_WEIGHTS") from error


def _is_header_length(file: Path) -> bool:
    """Whether the file begins as safetensors do: with a length, and then a JSON object."""
    with file.open("rb") as opened:
        length, brace = opened.read(8), opened.read(1)
    return brace == b"{" and int.from_bytes(length, "little") < file.stat().st_size


def _check_files(folder: Path) -> None:
    """Only the files of the format, and no links: what is checked here is what is read later."""
    if not folder.is_dir():
        refuse("NOT_A_BUNDLE", "the folder", "there is no such folder")
    found = {path.name: path for path in folder.iterdir()}
    if MANIFEST_FILE not in found:
        _refuse_without_manifest(found.keys())
    if WEIGHTS_FILE not in found:
        refuse("NOT_A_BUNDLE", WEIGHTS_FILE, "is missing")
    for name, path in sorted(found.items()):
        if name not in _FILES:
            refuse("FILES", name[:64], "is not a file of a bundle")
        if path.is_symlink() or not path.is_file():
            refuse("FILES", name, "must be an ordinary file, no link")
    for name, most in ((MANIFEST_FILE, MAX_MANIFEST_BYTES), (SIGNATURE_FILE, MAX_SIGNATURE_BYTES)):
        if name in found and found[name].stat().st_size > most:
            refuse("FILES", name, f"exceeds {most} bytes")


def _refuse_without_manifest(names: Any) -> None:
    if "config.json" in names or "params.json" in names:
        refuse(
            "NOT_A_BUNDLE",
            "the folder",
            "is a model, not a bundle: `moesaic expert pack FOLDER --base BASE --out BUNDLE` makes one of it",
        )
    if any(name.startswith("adapter_model") for name in names):
        refuse("NOT_A_BUNDLE", "the folder", "is an adapter, not a bundle: it has no manifest.json")
    refuse("NOT_A_BUNDLE", "the folder", f"is no bundle: it has no {MANIFEST_FILE}")


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A tensor to be written: `pieces` gives its little-endian bytes, once."""

    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[bytes | memoryview]]

    @classmethod
    def of(cls, values: Floats) -> TensorSource:
        """A tensor of float32 values."""
        data = np.ascontiguousarray(values, dtype="<f4").tobytes()
        return cls("F32", tuple(values.shape), lambda: iter((data,)))

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPE_BYTES[self.dtype]


def write_bundle(
    folder: str | Path,
    draft: Manifest,
    tensors: Mapping[str, TensorSource],
    show: Callable[[int], None] = lambda _: None,
) -> Bundle:
    """Writes a bundle and opens it. The draft lacks its `tensors` and the experts' versions, which are filled in.

    The folder appears when it is complete, never before. `show` is given the bytes written so far. Raises
    InvalidArgument with field `out` if there is such a folder already.
    """
    folder = Path(folder)
    if folder.exists():
        raise InvalidArgument("out: the folder is there already", field="out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    begun = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with (begun / WEIGHTS_FILE).open("wb") as file:
            facts = _write_weights(file, tensors, show)
        (begun / MANIFEST_FILE).write_bytes(_complete(draft, facts).to_json())
        begun.chmod(0o755)
        begun.rename(folder)
    except BaseException:
        shutil.rmtree(begun, ignore_errors=True)
        raise
    return open_bundle(folder)


def _complete(draft: Manifest, facts: Mapping[str, TensorFacts]) -> Manifest:
    def with_version(expert: BundleExpert) -> BundleExpert:
        return replace(expert, version=expert_version(expert, draft.hidden_size, facts).hex())

    return replace(draft, tensors=facts, experts=tuple(map(with_version, draft.experts)))


def _write_weights(
    file: BinaryIO, tensors: Mapping[str, TensorSource], show: Callable[[int], None]
) -> dict[str, TensorFacts]:
    file.write(_header(tensors))
    facts, written = {}, 0
    for name, source in _in_order(tensors):
        content = hashlib.sha256()
        for piece in source.pieces():
            content.update(piece)
            written += file.write(piece)
            show(written)
        facts[name] = TensorFacts(content.hexdigest(), source.dtype, source.shape)
    return facts


def _header(tensors: Mapping[str, TensorSource]) -> bytes:
    entries, end = {}, 0
    for name, source in _in_order(tensors):
        start, end = end, end + source.num_bytes
        entries[name] = {"dtype": source.dtype, "shape": source.shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _in_order(tensors: Mapping[str, TensorSource]) -> list[tuple[str, TensorSource]]:
    """The widest items first, so that every tensor begins at a multiple of its items' size."""
    return sorted(tensors.items(), key=lambda item: (-DTYPE_BYTES[item[1].dtype], item[0]))
