"""Log probabilities in the two shapes of OpenAI's API.

Completions have four lists, chat completions one list of tokens. A router without a tokenizer sends token ids
only; such a token is spelled `token_id:N`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gateway.openai.replies import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob
from moesaic.v1 import inference_pb2 as pb

# Stands for minus infinity, which JSON does not have. vLLM sends the same number.
_LOWEST = -9999.0


def for_completion(entries: Sequence[pb.TokenLogprob], offset: int) -> CompletionLogprobs:
    """`offset`: the position of the first token's text in the text of its choice."""
    tokens = [_spell(entry) for entry in entries]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return CompletionLogprobs(
        tokens=tokens,
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
                bytes=list(entry.token_bytes) if entry.token_bytes else None,
                top_logprobs=[
                    TopLogprob(
                        token=_spell_alternative(top),
                        logprob=_value(top.logprob),
                        bytes=list(top.text.encode()) if top.text else None,
                    )
                    for top in entry.top[:num_top]
                ],
            )
            for entry in entries
        ]
    )


def num_chars(entries: Iterable[pb.TokenLogprob]) -> int:
    """The total length of the tokens' spellings, in which `text_offset` counts."""
    return sum(len(_spell(entry)) for entry in entries)


def _top(entry: pb.TokenLogprob) -> dict[str, float]:
    """The alternatives and the token itself. Of two with the same text, the more probable one is kept."""
    top: dict[str, float] = {}
    for alternative in entry.top:
        top.setdefault(_spell_alternative(alternative), _value(alternative.logprob))
    top.setdefault(_spell(entry), _value(entry.logprob))
    return top


def _spell(entry: pb.TokenLogprob) -> str:
    if entry.text or entry.token_bytes:
        return entry.text
    return f"token_id:{entry.token_id}"


def _spell_alternative(alternative: pb.Alternative) -> str:
    return alternative.text or f"token_id:{alternative.token_id}"


def _value(logprob: float) -> float:
    return max(logprob, _LOWEST)
