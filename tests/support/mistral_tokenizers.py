"""Tokenizers in the files of those who train them, a few hundred tokens each."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import sentencepiece_model_pb2_new as sentencepiece_model

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
# In order of the merges that make them.
WORDS = ("▁h", "en", "▁hen", "▁▁", "th", "the", "▁the")


def sentencepiece_model_bytes(
    *, controls: Sequence[str] = (), user_defined: Sequence[str] = (), add_dummy_prefix: bool = True
) -> bytes:
    """As Mistral trains them: <unk>, <s>, </s>, further control tokens, bytes, then pieces by score."""
    model = sentencepiece_model.ModelProto()
    pieces = [("<unk>", _UNKNOWN), ("<s>", _CONTROL), ("</s>", _CONTROL)]
    pieces += [(piece, _CONTROL) for piece in controls]
    pieces += [(piece, _USER_DEFINED) for piece in user_defined]
    pieces += [(f"<0x{byte:02X}>", _BYTE) for byte in range(256)]
    pieces += [(piece, _NORMAL) for piece in (*WORDS, "▁", *"abcdefghijklmnopqrstuvwxyz,.!é</>")]
    seen: set[str] = set()
    for piece, kind in pieces:
        if piece not in seen:
            seen.add(piece)
            model.pieces.add(piece=piece, type=kind, score=-float(len(seen)))
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    for role, token_id in (("unk_id", 0), ("bos_id", 1), ("eos_id", 2)):
        setattr(model.trainer_spec, role, token_id)
    model.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


def tekken(*, specials: Sequence[str] | None = None, num_specials: int = 32) -> dict[str, Any]:
    """Bytes, a few merges of them, and places for special tokens. Without a list, those of the first such files."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"he", b"en", b"hen", b" hen", "😀".encode()[:2], "😀".encode()[:3]]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate([*tokens, b"beyond the model"])
    ]
    content: dict[str, Any] = {
        "config": {
            "pattern": r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
            "num_vocab_tokens": len(vocab),
            "default_vocab_size": num_specials + len(tokens),
            "default_num_special_tokens": num_specials,
            "version": "v3",
        },
        "vocab": vocab,
    }
    if specials is not None:
        content["special_tokens"] = [
            {"rank": rank, "token_str": special, "is_control": True} for rank, special in enumerate(specials)
        ]
    return content


def write_tekken(folder: Path, **kwargs: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps(tekken(**kwargs)))
    return folder


def write_sentencepiece(folder: Path, name: str = "tokenizer.model", **kwargs: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(sentencepiece_model_bytes(**kwargs))
    return folder
