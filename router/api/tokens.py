"""Text to token ids and back, as calls of their own.

A text may have megabytes. Answers are put together in pieces, because a single step over millions of tokens would
keep the interpreter from every other thread.
"""

from __future__ import annotations

from moesaic.errors import TOO_LARGE, InvalidArgument
from moesaic.rpc import PUBLIC_MESSAGE_BYTES
from moesaic.v1 import inference_pb2
from router.api.prompt import adds_special_tokens, check_text, render
from router.api.sampling_request import check_token_ids
from router.text.text import Text

_PIECE = 1 << 14


def tokenize(
    request: inference_pb2.TokenizeRequest, text: Text, max_model_len: int
) -> inference_pb2.TokenizeResponse:
    """The tokens of a text or conversation of any length. An empty text has those that are always added.

    Raises InvalidArgument, also for an answer that no message can hold.
    """
    token_ids = _token_ids(request, text)
    response = inference_pb2.TokenizeResponse(max_model_len=max_model_len)
    num_chars = 0
    for start in range(0, len(token_ids), _PIECE):
        piece = token_ids[start : start + _PIECE]
        response.token_ids.extend(piece)
        if request.return_tokens:
            spelled = list(map(text.token, piece))
            num_chars += sum(map(len, spelled))
            _check_size(num_chars, len(token_ids))
            response.tokens.extend(spelled)
    _check_size(response.ByteSize(), len(token_ids))
    return response


def detokenize(
    request: inference_pb2.DetokenizeRequest, text: Text, vocab_size: int
) -> inference_pb2.DetokenizeResponse:
    token_ids = tuple(request.token_ids)
    check_token_ids("tokens", token_ids, vocab_size)
    return inference_pb2.DetokenizeResponse(text=text.decode(token_ids, skip_special_tokens=False))


def _check_size(num_bytes: int, num_tokens: int) -> None:
    if num_bytes > PUBLIC_MESSAGE_BYTES:
        raise InvalidArgument(
            f"prompt: an answer with its {num_tokens} tokens exceeds {PUBLIC_MESSAGE_BYTES} bytes",
            field="prompt",
            reason=TOO_LARGE,
        )


def _token_ids(request: inference_pb2.TokenizeRequest, text: Text) -> tuple[int, ...]:
    if request.WhichOneof("prompt") == "chat":
        return render(request.chat, text).encode()
    check_text("prompt", request.text)
    return text.encode(request.text, add_special_tokens=adds_special_tokens(request))
