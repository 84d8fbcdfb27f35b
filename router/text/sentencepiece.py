"""Reads a SentencePiece model like those of Llama and Mistral into a tokenizer of the `tokenizers` library.

For every text the token ids are those of SentencePiece, whose own library is not needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from moesaic.errors import CheckpointError
from router.text.merges import merges_by_score
from router.text.tokenizer import TokenizerParts

_SPACE = "▁"
# Types of pieces and of models, by the numbers of SentencePiece.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_BYTE_PAIR_ENCODING = 2

# The part of SentencePiece's schema that is read, with its numbers and defaults. Enums are integers.
_SCHEMA = """
name: "moesaic/sentencepiece.proto"
message_type {
  name: "Model"
  field { name: "pieces" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".Model.Piece" }
  field { name: "trainer_spec" number: 2 type: TYPE_MESSAGE type_name: ".Model.Trainer" }
  field { name: "normalizer_spec" number: 3 type: TYPE_MESSAGE type_name: ".Model.Normalizer" }
  nested_type {
    name: "Piece"
    field { name: "piece" number: 1 type: TYPE_STRING }
    field { name: "score" number: 2 type: TYPE_FLOAT }
    field { name: "type" number: 3 type: TYPE_INT32 default_value: "1" }
  }
  nested_type {
    name: "Trainer"
    field { name: "model_type" number: 3 type: TYPE_INT32 default_value: "1" }
    field { name: "byte_fallback" number: 35 type: TYPE_BOOL }
    field { name: "unk_id" number: 40 type: TYPE_INT32 default_value: "0" }
    field { name: "bos_id" number: 41 type: TYPE_INT32 default_value: "1" }
    field { name: "eos_id" number: 42 type: TYPE_INT32 default_value: "2" }
  }
  nested_type {
    name: "Normalizer"
    field { name: "precompiled_charsmap" number: 2 type: TYPE_BYTES }
    field { name: "add_dummy_prefix" number: 3 type: TYPE_BOOL default_value: "true" }
    field { name: "remove_extra_whitespaces" number: 4 type: TYPE_BOOL default_value: "true" }
  }
}
"""


def _model_class() -> Any:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_SCHEMA, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Model"))


_MODEL = _model_class()


def read_sentencepiece(path: Path, *, spaces_everywhere: bool) -> TokenizerParts:
    """`spaces_everywhere`: a space is put after every added token, too, not only before a text.

    Raises CheckpointError for a file that is no such model, or one of another kind.
    """
    model = _MODEL()
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
            merges=merges_by_score(scores),
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
