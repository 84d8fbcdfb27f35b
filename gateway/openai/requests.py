"""The request bodies of OpenAI's API with vLLM's extensions, and their translation into a router's requests.

Every field is known or refused by name; null means absent. Types and the ranges of the wire are checked here.
The router, which knows the model, checks the meaning of a value (vocabulary, context, bounds).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from google.protobuf.struct_pb2 import Struct
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from gateway.openai.strict_json import readable
from moesaic.expert_policy import MAX_ENTRIES, MAX_ENTRY_CHARS, ExpertPolicy, OnMissing
from moesaic.v1 import inference_pb2 as pb

# OpenAI's default for completions. A chat completion may fill the context.
DEFAULT_MAX_TOKENS = 16
# Bounds on prompts, stop strings and messages of one request, above what real clients send.
MAX_PROMPTS = 1024
MAX_STOPS = 128
MAX_MESSAGES = 4096
MAX_SALT_CHARS = 256
MAX_VERSION_NAME_CHARS = 256

# The type of an error about a combination of fields. Its context names the field at fault.
COMBINATION = "combination"
# The names of union branches in the path of a validation error.
UNION_BRANCHES = frozenset({"<text>", "<texts>", "<ids>", "<id lists>", "<parts>", "<chat>"})

UInt32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**32 - 1)]
# A number in the range of float32, the type on the wire.
Number = Annotated[float, Field(ge=-3e38, le=3e38)]
TokenIdList = Annotated[list[UInt32], Field(fail_fast=True)]


def _not_served(value: object) -> None:
    if value in (None, [], {}, ""):
        return
    raise ValueError("this option is not supported")


# The type of a field that is parsed only so that it can be refused by name.
NotServed = Annotated[None, BeforeValidator(_not_served), WithJsonSchema({"type": "null"})]


# The type of a field of OpenAI's that cannot change an answer. It has no effect, whatever it holds.
Ignored = Annotated[JsonValue, WithJsonSchema({"description": "Accepted without effect."})]


def _int64(value: object) -> object:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise ValueError(f"must be a whole number in [{-(2**63)}, {2**63 - 1}]")
    return value


Int64 = Annotated[int, BeforeValidator(_int64)]


def _combination(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError(COMBINATION, "{message}", {"param": param, "message": message})


def _prompt_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    first = value[0] if value else 0
    return "<texts>" if isinstance(first, str) else "<id lists>" if isinstance(first, list) else "<ids>"


def _stop_kind(value: object) -> str | None:
    return "<text>" if isinstance(value, str) else "<texts>" if isinstance(value, list) else None


def _content_kind(value: object) -> str | None:
    return "<text>" if isinstance(value, str) else "<parts>" if isinstance(value, list) else None


def _token_id_keys(bias: dict[str, float]) -> dict[str, float]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < 2**32):
            raise ValueError(f"keys must be token ids, and {readable(key)!r} is none")
    return bias


def _finite(value: JsonValue) -> JsonValue:
    """Refuses numbers that a protobuf Struct cannot hold."""
    if isinstance(value, dict):
        for child in value.values():
            _finite(child)
    elif isinstance(value, list):
        for child in value:
            _finite(child)
    elif isinstance(value, int | float) and (abs(value) > 1e308 or math.isnan(value)):
        raise ValueError("numbers must be finite")
    return value


Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("<texts>")]
    | Annotated[TokenIdList, Tag("<ids>")]
    | Annotated[list[TokenIdList], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("<id lists>")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt",
        custom_error_message="must be a string, a list of strings, token ids, or a list of lists of token ids",
    ),
]
StopString = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    Annotated[StopString, Tag("<text>")]
    | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True), Tag("<texts>")],
    Discriminator(
        _stop_kind, custom_error_type="stop", custom_error_message="must be a string or a list of strings"
    ),
]
LogitBias = Annotated[dict[str, Number], AfterValidator(_token_id_keys)]
VersionName = Annotated[str, Field(min_length=1, max_length=MAX_VERSION_NAME_CHARS)]
TemplateKwargs = Annotated[dict[str, JsonValue], AfterValidator(_finite)]


class Body(BaseModel):
    """A JSON object. Unknown fields, values of other types and NaN are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Ignored = None


PolicyEntry = Annotated[str, Field(min_length=1, max_length=MAX_ENTRY_CHARS)]
PolicyEntries = Annotated[list[PolicyEntry], Field(max_length=MAX_ENTRIES, fail_fast=True)]


class Experts(Body):
    """Which experts may compute the answer: names of bundles, tags, or LAYER:SLOT."""

    deny: PolicyEntries | None = None
    # Of the experts that bundles added, only these are used.
    allow: PolicyEntries | None = None
    # The request fails unless its epoch has all of these.
    require: PolicyEntries | None = None
    # At most so many experts a token.
    top_k: Positive | None = None
    # What happens where no replica of an expert is left.
    on_missing: OnMissing | None = None

    def to_pb(self) -> pb.ExpertPolicy | None:
        """None where it says nothing. Raises InvalidArgument for an address that is malformed."""
        policy = ExpertPolicy(
            self.deny or (), self.allow or (), self.require or (), self.top_k, self.on_missing
        )
        return policy.to_pb() if policy else None


class GenerationBody(Body):
    """The fields that completions and chat completions share."""

    model: str | None = None
    n: Positive | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Int64 | None = None
    stop: Stop | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    # -1 means off, as in vLLM.
    top_k: Annotated[int, Field(ge=-1, le=2**32 - 1)] | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: LogitBias | None = None
    min_tokens: UInt32 | None = None
    stop_token_ids: TokenIdList | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    # The tenant. Only requests with the same salt share cached prefixes, and salts share the router fairly.
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARS)] | None = None
    experts: Experts | None = None
    # The id of an epoch that the server still holds, and the session that stays on one side of a canary.
    epoch: VersionName | None = None
    session_id: VersionName | None = None
    return_weight_versions: bool | None = None
    # Where OpenAI keeps, bills, routes and caches a request.
    user: Ignored = None
    safety_identifier: Ignored = None
    store: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise _combination("stream_options", "stream_options needs stream: true")
        return self

    @property
    def num_choices(self) -> int:
        """Continuations of each prompt."""
        return 1 if self.n is None else self.n

    def selected(self, **fields: Any) -> pb.GenerateRequest:
        """A call with `fields`, and with what says which weights compute it. Raises InvalidArgument."""
        return pb.GenerateRequest(
            model=self.model,
            n=self.num_choices,
            tenant=self.cache_salt,
            experts=None if self.experts is None else self.experts.to_pb(),
            epoch=self.epoch,
            session_id=self.session_id,
            return_weight_versions=self.return_weight_versions,
            **fields,
        )

    def sampling(self) -> pb.SamplingParams:
        """The shared sampling parameters. An absent field keeps the router's default."""
        same_name = (
            "seed",
            "temperature",
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "min_tokens",
            "stop_token_ids",
            "ignore_eos",
            "skip_special_tokens",
        )
        return pb.SamplingParams(
            **{name: getattr(self, name) for name in same_name},
            top_k=None if self.top_k is None else max(self.top_k, 0),
            stop=[self.stop] if isinstance(self.stop, str) else self.stop,
            logit_bias={int(token_id): bias for token_id, bias in (self.logit_bias or {}).items()},
            include_stop_in_output=self.include_stop_str_in_output,
        )


class CompletionRequest(GenerationBody):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: UInt32 | None = DEFAULT_MAX_TOKENS
    echo: bool | None = None
    logprobs: UInt32 | None = None
    best_of: UInt32 | None = None
    suffix: NotServed = None
    add_special_tokens: bool | None = None
    # For encoder-decoders: the tokens that the output begins with, such as the target language of a
    # translator.
    decoder_prompt: TokenIdList | None = None

    @model_validator(mode="after")
    def _check_counts(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.num_choices:
            raise _combination("best_of", "best_of is not supported unless it equals n")
        if self.max_tokens == 0 and not self.echo:
            raise _combination("max_tokens", "max_tokens must be at least 1, or 0 with echo: true")
        return self

    def calls(self) -> list[pb.GenerateRequest]:
        """One call for each prompt."""
        sampling = self.sampling()
        sampling.max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        if self.logprobs is not None:
            sampling.logprobs = self.logprobs
            if self.echo:
                sampling.prompt_logprobs = self.logprobs
        return [self._call(prompt, sampling) for prompt in _prompts(self.prompt)]

    def _call(self, prompt: str | Sequence[int], sampling: pb.SamplingParams) -> pb.GenerateRequest:
        call = self.selected(
            sampling=sampling,
            add_special_tokens=self.add_special_tokens,
            echo=bool(self.echo),
            decoder_prompt=self.decoder_prompt,
        )
        if isinstance(prompt, str):
            call.text = prompt
        else:
            call.token_ids.CopyFrom(pb.TokenIds(ids=prompt))
        return call


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return prompt
    return [prompt]  # type: ignore[list-item]


class TextPart(Body):
    """A part of a message's content. Images and sound are not supported, and no URL is ever fetched.

    Other keys, such as marks for another server's cache, are ignored.
    """

    model_config = ConfigDict(extra="ignore")

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Field(fail_fast=True), Tag("<parts>")],
    Discriminator(
        _content_kind,
        custom_error_type="content",
        custom_error_message="must be a string or a list of text parts",
    ),
]


class Message(Body):
    """A turn of a conversation. The messages of this API's replies are valid, too.

    An assistant's turn may lack content. Keys that are not listed here have no effect on what a template shows, and
    are ignored.
    """

    model_config = ConfigDict(extra="ignore")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Content | None = None
    name: str | None = None
    refusal: NotServed = None
    annotations: NotServed = None
    audio: NotServed = None
    function_call: NotServed = None
    tool_calls: NotServed = None
    tool_call_id: NotServed = None
    reasoning: NotServed = None
    reasoning_content: NotServed = None

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("content", "every message but an assistant's must have content")
        return self

    def to_pb(self) -> pb.ChatMessage:
        message = pb.ChatMessage(role=self.role, name=self.name)
        if isinstance(self.content, str):
            message.content = self.content
        else:
            message.parts.extend(pb.ContentPart(text=part.text) for part in self.content or ())
        return message


class ChatFields(Body):
    """A conversation, and the options of the chat template that renders it."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    # A template is code, and is never taken from a request.
    chat_template: NotServed = None

    def chat(self) -> pb.Chat:
        chat = pb.Chat(
            messages=[message.to_pb() for message in self.messages],
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
        )
        if self.chat_template_kwargs:
            kwargs = Struct()
            kwargs.update(self.chat_template_kwargs)
            chat.template_kwargs.CopyFrom(kwargs)
        return chat


class TextFormat(Body):
    type: Literal["text"]


class ChatCompletionRequest(GenerationBody, ChatFields):
    """POST /v1/chat/completions."""

    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: UInt32 | None = None
    response_format: TextFormat | None = None
    tools: NotServed = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: Ignored = None
    # What the answer will presumably be, for a server that can make use of it.
    prediction: Ignored = None
    functions: NotServed = None
    function_call: NotServed = None

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise _combination("top_logprobs", "top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise _combination("max_tokens", "max_tokens and max_completion_tokens differ: send one of them")
        return self

    def calls(self) -> list[pb.GenerateRequest]:
        """The single call of a conversation."""
        sampling = self.sampling()
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if limit is not None:
            sampling.max_tokens = limit
        if self.logprobs:
            sampling.logprobs = self.top_logprobs or 0
        return [self.selected(chat=self.chat(), sampling=sampling)]


class TokenizeTextRequest(Body):
    """POST /tokenize with a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def call(self) -> pb.TokenizeRequest:
        return pb.TokenizeRequest(
            model=self.model,
            text=self.prompt,
            add_special_tokens=self.add_special_tokens,
            return_tokens=self.return_token_strs,
        )


class TokenizeChatRequest(ChatFields):
    """POST /tokenize with a conversation."""

    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def call(self) -> pb.TokenizeRequest:
        return pb.TokenizeRequest(
            model=self.model,
            chat=self.chat(),
            add_special_tokens=self.add_special_tokens,
            return_tokens=self.return_token_strs,
        )


def _tokenize_kind(value: object) -> str:
    return "<chat>" if isinstance(value, dict) and "messages" in value else "<text>"


TokenizeRequest = Annotated[
    Annotated[TokenizeTextRequest, Tag("<text>")] | Annotated[TokenizeChatRequest, Tag("<chat>")],
    Discriminator(_tokenize_kind),
]


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIdList

    def call(self) -> pb.DetokenizeRequest:
        return pb.DetokenizeRequest(model=self.model, token_ids=self.tokens)
