"""A text or conversation as token ids, as a frozen value of the client library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from moesaic.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class Tokenization:
    """The token ids of a text or conversation, with the vocabulary's own spelling of each."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    # How many tokens a prompt and its answer may have together.
    max_model_len: int

    @classmethod
    def from_pb(cls, response: pb.TokenizeResponse) -> Self:
        return cls(tuple(response.token_ids), tuple(response.tokens), response.max_model_len)
