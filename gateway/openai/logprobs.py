"""Log probabilities in the two shapes of OpenAI's API.

Completions have four lists, chat completions one list of tokens. A token of a router without a tokenizer is spelled
`token_id:N`. Completions have no field for bytes and spell part of a character `bytes:\\xf0`, as OpenAI does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gateway.openai.replies import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob
from moesaic.v1 import inference_pb2 as pb

_Token = pb.TokenLogprob | pb.Alternative

# Stands for minus infinity, which JSON does not have. vLLM sends the same number.
_LOWEST = -9999.0


def for_completion(entries: Sequence[pb.TokenLogprob], offset: int) -> CompletionLogprobs:
    """`offset`: the position of the first token's text in the text of its choice."""
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += _length(entry)
    return CompletionLogprobs(
        tokens=[_key(entry) for entry in entries],
        token_logprobs=[_value(entry.logprob) if entry.HasField("logprob") else None for entry in entries],
        top_logprobs=[_top(entry) if entry.HasField("logprob") else None for entry in entries],
        text_offset=offsets,
    )


def for_chat(entries: Iterable[pb.TokenLogprob], num_top: int) -> ChatLogprobs:
    """Each token with `num_top` alternatives; zero gives an empty list."""
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                token=_spell(entry),
                logprob=_value(entry.logprob),
                bytes=_bytes(entry),
                top_logprobs=[
                    TopLogprob(token=_spell(top), logprob=_value(top.logprob), bytes=_bytes(top))
                    for top in entry.top[:num_top]
                ],
            )
            for entry in entries
        ]
    )


def num_chars(entries: Iterable[pb.TokenLogprob]) -> int:
    """The total length of the tokens' texts, in which `text_offset` counts."""
    return sum(map(_length, entries))


def _top(entry: pb.TokenLogprob) -> dict[str, float]:
    """The alternatives and the token itself, one entry for each token.

    Of tokens with the same spelling all but the most probable are named by their ids.
    """
    top: dict[str, float] = {}
    token_ids = set()
    tokens: list[_Token] = [*entry.top, entry]
    for token in tokens:
        if token.token_id not in token_ids:
            token_ids.add(token.token_id)
            key = _key(token)
            top[_token_id(token) if key in top else key] = _value(token.logprob)
    return top


def _key(token: _Token) -> str:
    """A token's name in completions, in which parts of characters differ."""
    try:
        token.token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.token_bytes)
    return _spell(token)


def _spell(token: _Token) -> str:
    return token.text if token.text or token.token_bytes else _token_id(token)


def _token_id(token: _Token) -> str:
    return f"token_id:{token.token_id}"


def _bytes(token: _Token) -> list[int] | None:
    return list(token.token_bytes) or None


def _length(entry: pb.TokenLogprob) -> int:
    return len(_spell(entry))


def _value(logprob: float) -> float:
    return max(logprob, _LOWEST)
