"""The body of a reply with a long list, rendered in pieces between which other requests go on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence

from moesaic.v1 import inference_pb2 as pb

_PIECE = 1 << 14


async def tokenize_reply(response: pb.TokenizeResponse, *, with_strings: bool) -> bytes:
    """The JSON of a replies.TokenizeReply."""
    head = {"count": len(response.token_ids), "max_model_len": response.max_model_len}
    parts = [json.dumps(head)[:-1], ', "tokens": [']
    parts += [piece async for piece in _pieces(response.token_ids)]
    if with_strings:
        parts.append('], "token_strs": [')
        parts += [piece async for piece in _pieces(response.tokens)]
    return "".join([*parts, "]}"]).encode()


async def _pieces(values: Sequence[int] | Sequence[str]) -> AsyncIterator[str]:
    for start in range(0, len(values), _PIECE):
        await asyncio.sleep(0)
        yield (", " if start else "") + json.dumps(list(values[start : start + _PIECE]))[1:-1]
