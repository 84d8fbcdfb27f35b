"""The arguments of the client's calls as the messages of inference.proto. Part of the client library.

A value that does not fit its field on the wire is an InvalidArgument that names the field. The router checks
the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypedDict, TypeVar

from google.protobuf.struct_pb2 import Struct

from moesaic.errors import InvalidArgument
from moesaic.expert_policy import ExpertPolicy
from moesaic.v1 import inference_pb2 as pb

ChatMessage = Mapping[str, Any]


class ArrayLike(Protocol):
    """An array of numpy, pandas, torch or the standard library. It must have one dimension."""

    def tolist(self) -> Any: ...


TokenIds = Sequence[int] | ArrayLike
# Text, token ids, or a conversation: messages with `role`, `content` and optionally `name`. Content is text, or a list
# of parts of the form {"type": "text", "text": ...}.
Prompt = str | TokenIds | Sequence[ChatMessage]


class GenerateOptions(TypedDict, total=False):
    """Options, of which None, as absence, means the router's default. For temperature, top_p, top_k, min_p and
    repetition_penalty that is the model's own where its generation_config.json has one:

    max_tokens              the length of the answer; by default the context that the prompt leaves
    min_tokens              the answer does not end before this many tokens (0)
    temperature             0 is greedy (1)
    top_p                   nucleus sampling: the share of probability that is kept (1)
    top_k                   the number of most probable tokens that are kept; 0 keeps all (0)
    min_p                   drops tokens below this share of the best token's probability (0)
    presence_penalty        in [-2, 2], over generated tokens (0)
    frequency_penalty       in [-2, 2], over generated tokens (0)
    repetition_penalty      in (0, 10], over prompt and generated tokens (1)
    seed                    makes the answer repeatable; continuation i of n uses seed + i
    stop                    a string, or several, before which the answer ends
    stop_token_ids          token ids with which the answer ends
    logit_bias              what is added to the logits of tokens: {token id: in [-100, 100]}
    logprobs                log probabilities, with those of this many alternatives to each token
    prompt_logprobs         the same for the prompt
    ignore_eos              whether to go on after an end-of-sequence token (False)
    skip_special_tokens     whether special tokens are left out of the text (True)
    include_stop_in_output  whether the text keeps the stop string that ended it (False)
    add_special_tokens      for a text prompt: whether the tokenizer adds its special tokens (True)
    decoder_prompt          for encoder-decoders: token ids that the output begins with
    add_generation_prompt   for a conversation: whether an assistant turn is opened at its end (True)
    continue_final_message  for a conversation: whether its last message is continued (False)
    template_kwargs         for a conversation: further variables of the chat template
    model                   the name of the model; by default the one that the router serves
    tenant                  tenants share the router fairly, and never share cached prefixes
    experts                 which experts may compute the answer: Deny("NAME"), Allow, Require, ExpertPolicy
    epoch                   the id of an epoch that the router holds; by default the current one
    session                 requests of one session are on the same side of a canary
    return_weight_versions  whether the end of the answer names the versions that computed its tokens (False)
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
    stop_token_ids: TokenIds | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    prompt_logprobs: int | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    include_stop_in_output: bool | None
    add_special_tokens: bool | None
    decoder_prompt: TokenIds | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    template_kwargs: Mapping[str, Any] | None
    model: str | None
    tenant: str | None
    experts: ExpertPolicy | None
    epoch: str | None
    session: str | None
    return_weight_versions: bool | None


# The options that are not sampling parameters.
_OTHER_OPTIONS = frozenset(
    {
        "add_special_tokens",
        "decoder_prompt",
        "add_generation_prompt",
        "continue_final_message",
        "template_kwargs",
        "model",
        "tenant",
        "experts",
        "epoch",
        "session",
        "return_weight_versions",
    }
)


_Method = TypeVar("_Method", bound=Callable[..., Any])


def shows_options(method: _Method) -> _Method:
    """Names the options of GenerateOptions in the signature and the docstring of a method that takes them."""
    signature = inspect.signature(method)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in GenerateOptions.__annotations__.items()
    ]
    named = [it for it in signature.parameters.values() if it.kind is not inspect.Parameter.VAR_KEYWORD]
    described: Any = method
    described.__signature__ = signature.replace(parameters=[*named, *options])
    if method.__doc__ and GenerateOptions.__doc__:  # absent under `python -OO`
        method.__doc__ = f"{inspect.cleandoc(method.__doc__)}\n\n{inspect.cleandoc(GenerateOptions.__doc__)}"
    return method


def refuse_n(options: Mapping[str, Any]) -> None:
    """Raises InvalidArgument for `n`, which no method takes that returns one continuation."""
    if "n" in options:
        raise InvalidArgument("n: complete() gives one continuation: use generate(n=…)", field="n")


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
    _select_weights(request, given)
    assign_ids(request.decoder_prompt, given.get("decoder_prompt", ()), field="decoder_prompt")
    if isinstance(prompt, str):
        _set(request, text=prompt)
        return request
    items = _items(prompt, field="prompt")
    if items and isinstance(items[0], Mapping):
        request.chat.CopyFrom(_chat(items, given))
    else:
        request.token_ids.SetInParent()
        assign_ids(request.token_ids.ids, items, field="prompt")
    return request


def tokenize_request(
    prompt: str | Sequence[ChatMessage], add_special_tokens: bool | None
) -> pb.TokenizeRequest:
    """Raises InvalidArgument."""
    request = pb.TokenizeRequest(return_tokens=True)
    _set(request, add_special_tokens=add_special_tokens)
    if isinstance(prompt, str):
        _set(request, text=prompt)
    else:
        request.chat.CopyFrom(_chat(_items(prompt, field="prompt"), {}))
    return request


def detokenize_request(token_ids: TokenIds) -> pb.DetokenizeRequest:
    """Raises InvalidArgument."""
    request = pb.DetokenizeRequest()
    assign_ids(request.token_ids, token_ids, field="token_ids")
    return request


def _select_weights(request: pb.GenerateRequest, given: Mapping[str, Any]) -> None:
    """Sets what says by which weights the request is computed, and whether the answer names them."""
    _set(
        request,
        epoch=_text("epoch", given),
        session_id=_text("session", given),
        return_weight_versions=given.get("return_weight_versions"),
    )
    policy = given.get("experts", ExpertPolicy())
    if not isinstance(policy, ExpertPolicy):
        raise InvalidArgument(
            'experts: must be an ExpertPolicy, such as Deny("NAME") or Allow("NAME")', field="experts"
        )
    if policy:
        request.experts.CopyFrom(policy.to_pb())


def _text(name: str, given: Mapping[str, Any]) -> str:
    """A text option, empty where it is absent. Raises InvalidArgument."""
    value = given.get(name, "")
    if not isinstance(value, str):
        raise InvalidArgument(f"{name} must be a text", field=name)
    return value


def _sampling(given: Mapping[str, Any]) -> pb.SamplingParams:
    sampling = pb.SamplingParams()
    for name, value in given.items():
        if name == "stop_token_ids":
            assign_ids(sampling.stop_token_ids, value, field=name)
        elif name not in _OTHER_OPTIONS:
            _set(sampling, **{name: [value] if name == "stop" and isinstance(value, str) else value})
    return sampling


def _chat(messages: Sequence[Any], options: Mapping[str, Any]) -> pb.Chat:
    """A conversation and the options for its template. Raises InvalidArgument."""
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


def assign_ids(ids: Any, values: Any, *, field: str) -> None:
    """Appends token ids to a repeated field. Raises InvalidArgument, which names `field`."""
    try:
        ids.extend(_items(values, field=field))
    except (TypeError, ValueError) as error:
        expected = "text, messages, or token ids" if field == "prompt" else "token ids"
        raise InvalidArgument(f"{field} must be {expected} of at least 0", field=field) from error


def _items(values: Any, *, field: str) -> list[Any]:
    """The items of a sequence or array. Raises InvalidArgument, which names `field`."""
    if isinstance(values, bytes | bytearray | memoryview):
        raise InvalidArgument(f"{field} must not be bytes: decode them to text first", field=field)
    if isinstance(values, Mapping):
        raise InvalidArgument(f"{field} must be a list, also where it has one message", field=field)
    items = values.tolist() if hasattr(values, "tolist") else values
    try:
        items = list(items)
    except TypeError as error:
        raise InvalidArgument(f"{field} must be a sequence", field=field) from error
    if items and isinstance(items[0], list | tuple):
        raise InvalidArgument(f"{field} must have one dimension: give one prompt a call", field=field)
    return items
