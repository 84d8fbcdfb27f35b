"""The facts about a model folder that can be found without reading weights: with those, all reasons that a router or a
worker has to refuse it when it loads."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.checkpoints.memory_fit import Memory, MemoryFit, fit_model
from cluster.checkpoints.model_facts import ModelFacts, gather_facts
from moesaic.checkpoints.checkpoint import CONFIG_FILE, PICKLE_SUFFIXES, Checkpoint, open_checkpoint
from moesaic.checkpoints.mistral_params import PARAMS_FILE
from moesaic.checkpoints.safetensors_file import read_json
from moesaic.errors import CheckpointError
from moesaic.families import MoeModel, describe_model
from moesaic.settings import Settings
from router.api.sampling_defaults import read_sampling_defaults
from router.text.chat_template import (
    TEMPLATE_FILE,
    TEMPLATE_JSON_FILE,
    TOKENIZER_CONFIG_FILE,
    find_template,
)

if TYPE_CHECKING:
    from router.text.text import Text

# The file names of tokenizers, in the order in which a router looks for them.
TOKENIZER_FILES = ("tokenizer.json", "tekken.json", "*.model.v*", "tokenizer.model")

HUGGING_FACE = "Hugging Face"
MISTRAL = "Mistral's own"
PICKLES = "pickles"
MISTRAL_CHAT = "Mistral's own format"

MAX_TOKENIZER_CONFIG_BYTES = 64 << 20

_VERSION = re.compile(r"\.v(\d+)")


@dataclass(frozen=True, slots=True)
class Problem:
    """The reason why a folder cannot be served."""

    message: str
    field: str | None


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """The stored tensors: their files, number, and bytes by dtype, named as in the files."""

    files: int
    tensors: int
    bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Inspection:
    """The facts about a folder. A fact that a problem leaves unknown is None."""

    folder: str
    problem: Problem | None
    family: str | None
    layout: str | None
    stored: StoredTensors | None
    model: ModelFacts | None
    memory: MemoryFit | None
    tokenizer: str | None
    # The file that holds the chat template, or MISTRAL_CHAT.
    chat_template: str | None

    @property
    def serves(self) -> bool:
        return self.problem is None


def inspect_folder(
    folder: Path, settings: Settings | None = None, memory: Memory | None = None
) -> Inspection:
    """Reads headers and small files; `memory` is that of the machine that would serve. Raises CheckpointError for a folder
    that cannot be read."""
    settings = settings or Settings()
    names = _file_names(folder)
    tokenizer = _find_tokenizer(names)
    checkpoint, model, problem, chat = None, None, None, None
    try:
        checkpoint = open_checkpoint(folder)
        model = describe_model(checkpoint, settings.dense_layers)
        if settings.engine.generation_config == "auto":
            read_sampling_defaults(folder)
        chat = _find_chat(folder) if _load_text(folder).has_chat_template else None
    except CheckpointError as error:
        problem = Problem(error.message, error.field)
    return Inspection(
        folder=folder.resolve().name,
        problem=problem,
        family=_claimed_family(folder) if model is None else model.family,
        layout=_guess_layout(names) if checkpoint is None else _layout(checkpoint, model),
        stored=None if checkpoint is None else _stored(checkpoint),
        model=None if checkpoint is None or model is None else gather_facts(checkpoint, model),
        memory=None if model is None or memory is None else fit_model(model, settings, memory),
        tokenizer=tokenizer,
        chat_template=chat,
    )


def _file_names(folder: Path) -> list[str]:
    """The names in the folder, sorted. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError("model: no such folder", field="model")
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"model: cannot be read: {error.strerror}", field="model") from error


def _stored(checkpoint: Checkpoint) -> StoredTensors:
    sizes = Counter[str]()
    for entry in checkpoint.tensors.values():
        sizes[entry.dtype] += entry.num_bytes
    files = {entry.file for entry in checkpoint.tensors.values()}
    return StoredTensors(len(files), len(checkpoint.tensors), dict(sizes.most_common()))


def _layout(checkpoint: Checkpoint, model: MoeModel | None) -> str:
    """The form of the folder, and how it stores the experts of a gated layer."""
    form = MISTRAL if checkpoint.in_mistral_format else HUGGING_FACE
    gated = [] if model is None else [layer for layer in model.experts.values() if layer.gate is not None]
    if not gated:
        return form
    patterns = gated[0].layout.values()
    stacked = any(pattern.stacked for pattern in patterns)
    encodings = {pattern.encoding for pattern in patterns} - {"plain"}
    how = "all experts of a layer in one tensor" if stacked else "every expert by itself"
    return ", ".join((form, how, *sorted(encodings)))


def _guess_layout(names: Sequence[str]) -> str | None:
    """The likely form of a folder that cannot be opened, by its file names."""
    if any(name.endswith(".safetensors") for name in names):
        return HUGGING_FACE if CONFIG_FILE in names else MISTRAL if PARAMS_FILE in names else None
    return PICKLES if any(Path(name).suffix in PICKLE_SUFFIXES for name in names) else None


def _load_text(folder: Path) -> Text:
    """Tokenizer, end tokens and chat format, loaded as by a router. Raises CheckpointError."""
    from router.text.text import load_text  # imports transformers, which takes seconds: last of all

    return load_text(folder)


def _claimed_family(folder: Path) -> str | None:
    """The family that config.json names, for a model that cannot be served."""
    try:
        family = read_json(folder / CONFIG_FILE).get("model_type")
    except CheckpointError:
        return None
    return family if isinstance(family, str) else None


def _find_tokenizer(names: Sequence[str]) -> str | None:
    """The name of the tokenizer file, the newest of several versions."""
    found = (fnmatch.filter(names, pattern) for pattern in TOKENIZER_FILES)
    return next((max(versions, key=_version) for versions in found if versions), None)


def _version(name: str) -> int:
    """The number in a versioned name: 11 for tokenizer.model.v11."""
    match = _VERSION.search(name)
    return int(match[1]) if match else 0


def _find_chat(folder: Path) -> str:
    """The source of the chat format of a folder that has one. Raises CheckpointError."""
    config_file = folder / TOKENIZER_CONFIG_FILE
    config = read_json(config_file, MAX_TOKENIZER_CONFIG_BYTES) if config_file.is_file() else {}
    if find_template(folder, config) is None:
        return MISTRAL_CHAT
    own_files = (name for name in (TEMPLATE_FILE, TEMPLATE_JSON_FILE) if (folder / name).is_file())
    return next(own_files, TOKENIZER_CONFIG_FILE)
