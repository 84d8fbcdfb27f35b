"""A SentencePiece model, as Llama and Mistral trained theirs, as a tokenizer of the `tokenizers` library.

The token ids are those of SentencePiece for every text; its own library is not needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from google.protobuf.message import DecodeError
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers.convert_slow_tokenizer import generate_merges
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece_model

from moesaic.errors import CheckpointError
from router.text.tokenizer import TokenizerParts

_SPACE = "▁"
# Types of pieces and of models, as SentencePiece numbers them.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_BYTE_PAIR_ENCODING = 2


def read_sentencepiece(path: Path, *, spaces_everywhere: bool) -> TokenizerParts:
    """`spaces_everywhere`: a space is put in front of what follows an added token, too, not only of a whole text.

    Raises CheckpointError for a file that is none, or one of another kind of model.
    """
    model = sentencepiece_model.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        _fail(path, "is not a SentencePiece model")
    spec, normalizer = model.trainer_spec, model.normalizer_spec
    if spec.model_type != _BYTE_PAIR_ENCODING or not spec.byte_fallback:
        _fail(path, "only byte pair encoding with bytes for what it has no piece for is read")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        _fail(path, "only models that leave a text as it is are read")
    if not all(isinstance(piece.piece, str) for piece in model.pieces):
        _fail(path, "its pieces are not UTF-8")
    vocab = {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
    if len(vocab) < len(model.pieces) or not 0 <= spec.unk_id < len(vocab):
        _fail(path, "its pieces do not all occur once, or the unknown one is missing")
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    spaced = normalizer.add_dummy_prefix
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=generate_merges({piece: vocab[piece] for piece in scores}, scores),
            byte_fallback=True,
            unk_token=model.pieces[spec.unk_id].piece,
            fuse_unk=True,
        )
    )
    prepend = [normalizers.Prepend(_SPACE)] if spaced and spaces_everywhere else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if spaced else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_tokens(
        [
            AddedToken(piece.piece, special=piece.type != _USER_DEFINED, normalized=False)
            for piece in model.pieces
            if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    roles = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id}
    names = {role: model.pieces[piece].piece for role, piece in roles.items() if 0 <= piece < len(vocab)}
    return TokenizerParts(backend, names, begins_with_space=spaced and not spaces_everywhere)


def _fail(path: Path, problem: str) -> NoReturn:
    raise CheckpointError(f"{path.name}: {problem}", field=path.name)
