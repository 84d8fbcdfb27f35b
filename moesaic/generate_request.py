"""The arguments of the client's calls as the messages of inference.proto. Part of the client library.

A value that does not fit its field on the wire is an InvalidArgument that names the field. The router checks
the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypedDict

from google.protobuf.struct_pb2 import Struct

from moesaic.errors import InvalidArgument
from moesaic.v1 import inference_pb2 as pb

ChatMessage = Mapping[str, Any]
# Text, token ids, or a conversation: messages with `role`, `content` and optionally `name`. Content is text, or a list
# of parts of the form {"type": "text", "text": ...}.
Prompt = str | Sequence[int] | Sequence[ChatMessage]


class GenerateOptions(TypedDict, total=False):
    """The keyword options of `generate` and `complete`. None, as absence, means the router's default.

    Meanings, bounds and defaults are those of `SamplingParams` and `GenerateRequest` in inference.proto.
    """

    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    prompt_logprobs: int | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    include_stop_in_output: bool | None
    # Applies to a text prompt.
    add_special_tokens: bool | None
    # For encoder-decoders: the tokens that the output begins with, such as the target language.
    decoder_prompt: Sequence[int] | None
    # The following three apply to a conversation.
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    template_kwargs: Mapping[str, Any] | None
    # Empty or absent means the model that the router serves.
    model: str | None
    # Tenants share the router fairly, and never share cached prefixes.
    tenant: str | None


_PROMPT_OPTIONS = frozenset(
    {
        "add_special_tokens",
        "decoder_prompt",
        "add_generation_prompt",
        "continue_final_message",
        "template_kwargs",
        "model",
        "tenant",
    }
)


def generate_request(
    prompt: Prompt, n: int, request_id: str | None, options: GenerateOptions
) -> pb.GenerateRequest:
    """Raises TypeError for an unknown option, InvalidArgument for a value that does not fit its field."""
    unknown = options.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"generate() got an unexpected keyword argument {min(unknown)!r}")
    given = {name: value for name, value in options.items() if value is not None}
    request = pb.GenerateRequest(request_id=request_id or "", sampling=_sampling(given))
    _set(
        request,
        n=n,
        model=given.get("model", ""),
        add_special_tokens=given.get("add_special_tokens"),
        tenant=given.get("tenant", ""),
    )
    assign_ids(request.decoder_prompt, options.get("decoder_prompt") or (), field="decoder_prompt")
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        request.chat.CopyFrom(chat_from(prompt, given))
    else:
        request.token_ids.SetInParent()
        assign_ids(request.token_ids.ids, prompt, field="prompt")
    return request


def _sampling(given: Mapping[str, Any]) -> pb.SamplingParams:
    sampling = pb.SamplingParams()
    for name, value in given.items():
        if name not in _PROMPT_OPTIONS:
            _set(sampling, **{name: [value] if name == "stop" and isinstance(value, str) else value})
    return sampling


def chat_from(messages: Sequence[Any], options: Mapping[str, Any] | None = None) -> pb.Chat:
    """A conversation and the options for its template. Raises InvalidArgument."""
    options = options or {}
    chat = pb.Chat()
    try:
        chat.messages.extend(pb.ChatMessage(**_with_parts(message)) for message in messages)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            "messages must have a role, a content (a string or a list of text parts), and at most a name",
            field="prompt",
        ) from error
    _set(
        chat,
        add_generation_prompt=options.get("add_generation_prompt"),
        continue_final_message=options.get("continue_final_message"),
    )
    if "template_kwargs" in options:
        chat.template_kwargs.CopyFrom(_struct(options["template_kwargs"]))
    return chat


def _with_parts(message: ChatMessage) -> dict[str, Any]:
    """The fields of a message. Raises TypeError or ValueError for a part that is not text."""
    fields = dict(message)
    content = fields.get("content")
    if content is None or isinstance(content, str):
        return fields
    del fields["content"]
    if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        raise ValueError("only parts of text are served")
    return {**fields, "parts": [pb.ContentPart(text=part["text"]) for part in content]}


def _struct(values: Mapping[str, Any]) -> Struct:
    struct = Struct()
    try:
        struct.update(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument("template_kwargs must hold JSON values", field="template_kwargs") from error
    return struct


class _Message(Protocol):
    """The part of a protobuf message that `_set` needs."""

    def MergeFrom(self, msg: Any, /) -> None: ...


def _set(message: _Message, **fields: Any) -> None:
    """Sets fields one by one, so that the error names the field whose value does not fit its wire type."""
    for name, value in fields.items():
        try:
            message.MergeFrom(type(message)(**{name: value}))
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"{name} has the wrong type or is out of range", field=name) from error


def assign_ids(ids: Any, values: Sequence[Any], *, field: str) -> None:
    """Appends token ids to a repeated field. Raises InvalidArgument, which names `field`."""
    try:
        ids.extend(values)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{field} must be text, messages, or token ids of at least 0", field=field
        ) from error
