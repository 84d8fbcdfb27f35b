"""Reads tokenizer.json as AutoTokenizer of transformers does, without ever running code of the folder.

The class that AutoTokenizer chooses by tokenizer_config.json and the model's type may build normalizer, pre-tokenizer and
decoder by itself, from keys such as `add_prefix_space`, and then takes only the vocabulary of the file.
"""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moesaic.errors import CheckpointError
from router.text.tokenizer import TextTokenizer

log = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"


def read_hf_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer of a folder that has a tokenizer.json. Raises CheckpointError for one that cannot be read."""
    found = _by_class(folder) or _as_it_lies(folder)
    return TextTokenizer(found.backend_tokenizer, found.special_tokens_map)


def _by_class(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of the class that AutoTokenizer chooses; None where that would be code of the folder, or a class of
    another kind."""
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (
        Exception
    ) as error:  # the library raises bare exceptions, also for types of models that it does not know
        fields = {"error": type(error).__name__}
        log.info(
            "no class of transformers reads the tokenizer: it is read as it lies", extra={"fields": fields}
        )
        return None
    return found if isinstance(found, PreTrainedTokenizerFast) else None


def _as_it_lies(folder: Path) -> PreTrainedTokenizerFast:
    try:
        found: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True
        )
    except Exception as error:  # the library raises bare exceptions for a file that it cannot read
        raise CheckpointError(f"{TOKENIZER_FILE} cannot be read", field=TOKENIZER_FILE) from error
    return found
