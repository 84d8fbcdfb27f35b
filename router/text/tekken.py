"""Reads Mistral's tekken.json, byte strings by rank and a pattern, into a tokenizer of `tokenizers`.

For every text the token ids are those of Mistral's own library, which is not needed.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from moesaic.errors import CheckpointError
from router.text.merges import merges_by_score
from router.text.tokenizer import TokenizerParts
from router.text.vocabulary import BYTE_ALPHABET

# The special tokens, in order of id, of files that do not list them.
_UNLISTED_SPECIALS = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
]
# The most special tokens that a file may reserve ids for. Published files reserve a thousand.
_MOST_SPECIALS = 1 << 16
_NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def read_tekken(path: Path) -> TokenizerParts:
    """The ids reserved for special tokens come first, then the vocabulary by rank. Raises CheckpointError."""
    try:
        return _parse(json.loads(path.read_bytes()))
    except Exception as error:  # the library raises bare exceptions for an invalid pattern
        raise CheckpointError(f"{path.name} is not a tekken tokenizer", field=path.name) from error


def _parse(content: Any) -> TokenizerParts:
    config = content["config"]
    num_specials = config["default_num_special_tokens"]
    if num_specials > _MOST_SPECIALS:
        raise ValueError("too many special tokens")
    specials = _specials(content.get("special_tokens"), num_specials)
    entries = content["vocab"][: config["default_vocab_size"] - num_specials]
    if any(entry["rank"] != rank for rank, entry in enumerate(entries)):
        raise ValueError("the vocabulary is not in order of rank")
    pieces = [_alphabetical(base64.b64decode(entry["token_bytes"])) for entry in entries]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    if len(ranks) < len(pieces) or not ranks.keys() >= set(BYTE_ALPHABET.values()):
        raise ValueError("the vocabulary does not hold every token once and every byte")
    vocab = {piece: num_specials + rank for piece, rank in ranks.items()}
    vocab.update({special: token_id for token_id, special in enumerate(specials)})
    # The lower the rank, the earlier the merge.
    merges = merges_by_score({piece: -rank for piece, rank in ranks.items()})
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(config["pattern"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(special, normalized=False) for special in specials])
    return TokenizerParts(backend, _NAMES, begins_with_space=False)


def _specials(listed: list[dict[str, Any]] | None, num_specials: int) -> list[str]:
    if listed is None:
        named = dict(enumerate(_UNLISTED_SPECIALS))
    else:
        named = {entry["rank"]: entry["token_str"] for entry in listed}
    specials = [named.get(rank, f"<SPECIAL_{rank}>") for rank in range(num_specials)]
    if len(set(specials)) < num_specials or not set(specials).issuperset(_NAMES.values()):
        raise ValueError("the special tokens do not all occur once")
    return specials


def _alphabetical(token: bytes) -> str:
    return "".join(BYTE_ALPHABET[byte] for byte in token)
