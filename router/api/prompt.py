"""The prompt of a request (text, token ids or a conversation), checked and turned into tokens.

All of this takes time in proportion to the prompt and has no side effects, so the service can run it off its
event loop. Errors name fields as the HTTP API does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from google.protobuf import struct_pb2

from moesaic.errors import InvalidArgument, Unsupported
from moesaic.v1 import inference_pb2
from router.api.sampling_request import ModelLimits, check_token_ids, context_exceeded, encoded
from router.text.text import Conversation, Text


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens that the model reads, and the same as text (after the chat template)."""

    token_ids: tuple[int, ...]
    text: str
    # The tokens that the answer begins with, where an encoder reads the prompt.
    decoder_token_ids: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """How much of the context is taken before anything is generated."""
        return len(self.token_ids) + len(self.decoder_token_ids)


def read_prompt(request: inference_pb2.GenerateRequest, text: Text, limits: ModelLimits) -> Prompt:
    """The prompt of a request. Raises InvalidArgument, or Unsupported where the model lacks what the request
    needs: a tokenizer, a chat template, or a text that continues its prompt."""
    if limits.encodes_prompts:
        _refuse_continuing(request)
    match request.WhichOneof("prompt"):
        case "text":
            prompt = _from_text(request, text, limits)
        case "token_ids":
            prompt = _from_token_ids(request, text, limits)
        case "chat":
            prompt = _from_chat(request, text, limits)
        case _:
            raise _empty()
    if not prompt.token_ids:
        raise _empty()
    return replace(prompt, decoder_token_ids=_decoder_prompt(request, limits))


def render(chat: inference_pb2.Chat, text: Text) -> Conversation:
    """A conversation in the model's format. By default it has a generation prompt unless it is continued."""
    if not chat.messages:
        raise InvalidArgument("messages: must not be empty", field="messages")
    opens_turn = not chat.continue_final_message
    if chat.HasField("add_generation_prompt"):
        opens_turn = chat.add_generation_prompt
    if opens_turn and chat.continue_final_message:
        raise InvalidArgument(
            "continue_final_message: excludes add_generation_prompt", field="continue_final_message"
        )
    return text.render_chat(
        [_message(message) for message in chat.messages],
        add_generation_prompt=opens_turn,
        continue_final_message=chat.continue_final_message,
        variables=_plain_struct(chat.template_kwargs),
    )


def _refuse_continuing(request: inference_pb2.GenerateRequest) -> None:
    if request.WhichOneof("prompt") == "chat":
        raise encoded("messages")
    if request.echo:
        raise encoded("echo")


def _decoder_prompt(request: inference_pb2.GenerateRequest, limits: ModelLimits) -> tuple[int, ...]:
    token_ids = tuple(request.decoder_prompt)
    if token_ids and not limits.encodes_prompts:
        raise Unsupported(
            "decoder_prompt: this model has no encoder; its answer continues the prompt",
            field="decoder_prompt",
        )
    check_token_ids("decoder_prompt", token_ids, limits.vocab_size)
    return token_ids


def _from_text(request: inference_pb2.GenerateRequest, text: Text, limits: ModelLimits) -> Prompt:
    check_text("prompt", request.text)
    added = adds_special_tokens(request)
    return _encoded(request.text, lambda: text.encode(request.text, add_special_tokens=added), text, limits)


def _from_token_ids(request: inference_pb2.GenerateRequest, text: Text, limits: ModelLimits) -> Prompt:
    token_ids = tuple(request.token_ids.ids)
    if len(token_ids) > limits.max_model_len:
        raise context_exceeded(limits.max_model_len, f"but the prompt has {len(token_ids)}")
    check_token_ids("prompt", token_ids, limits.vocab_size)
    sampling = request.sampling
    skip = sampling.skip_special_tokens if sampling.HasField("skip_special_tokens") else True
    return Prompt(token_ids, text.decode(token_ids, skip_special_tokens=skip))


def _from_chat(request: inference_pb2.GenerateRequest, text: Text, limits: ModelLimits) -> Prompt:
    conversation = render(request.chat, text)
    return _encoded(conversation.text, conversation.encode, text, limits)


def _encoded(content: str, encode: Callable[[], tuple[int, ...]], text: Text, limits: ModelLimits) -> Prompt:
    # A text that cannot fit is refused before the work of tokenizing it.
    if text.least_tokens(content) > limits.max_model_len:
        raise context_exceeded(limits.max_model_len, "but the prompt has more")
    token_ids = encode()
    check_token_ids("prompt", token_ids, limits.vocab_size)
    return Prompt(token_ids, content)


def adds_special_tokens(request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest) -> bool:
    return request.add_special_tokens if request.HasField("add_special_tokens") else True


def _message(message: inference_pb2.ChatMessage) -> dict[str, Any]:
    if not message.role:
        raise InvalidArgument("messages: every message must have a role", field="messages")
    if message.content and message.parts:
        raise InvalidArgument("messages: content and parts exclude each other", field="messages")
    parts = [part.text for part in message.parts]
    for value in (message.role, message.content, message.name, *parts):
        check_text("messages", value)
    content = [{"type": "text", "text": part} for part in parts] if parts else message.content
    name = {"name": message.name} if message.name else {}
    return {"role": message.role, "content": content, **name}


def check_text(field: str, content: str) -> None:
    if "\0" in content:
        raise InvalidArgument(f"{field}: must not contain NUL", field=field)


def _plain_struct(struct: struct_pb2.Struct) -> dict[str, Any]:
    return {key: _plain(value) for key, value in struct.fields.items()}


def _plain(value: struct_pb2.Value) -> Any:
    """A JSON value as templates expect it, with whole numbers as integers."""
    match value.WhichOneof("kind"):
        case "struct_value":
            return _plain_struct(value.struct_value)
        case "list_value":
            return [_plain(item) for item in value.list_value.values]
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
    return None


def _empty() -> InvalidArgument:
    return InvalidArgument("prompt: must not be empty", field="prompt")
