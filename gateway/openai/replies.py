"""Reply bodies of OpenAI's API, with vLLM's `token_ids` and `weight_versions`, and the project's `epoch` and `moesaic`.

Fields that are not set are left out of the JSON (`exclude_unset`), so that a reply holds what was requested,
and `null` only where OpenAI sends it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from moesaic.expert_policy import OnMissing


class PromptTokensDetails(BaseModel):
    # Prompt tokens whose keys and values an earlier request had computed.
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Policy(BaseModel):
    """Which experts were denied, allowed and required: what the request had of these."""

    deny: list[str] | None = None
    allow: list[str] | None = None
    require: list[str] | None = None
    top_k: int | None = None
    on_missing: OnMissing | None = None


class Degraded(BaseModel):
    """An answer that is not the full one: what stood in for missing experts, and in how many (token, layer, slot)
    assignments."""

    policy: OnMissing
    assignments: int


class Computation(BaseModel):
    """By what an answer was computed."""

    epoch: str
    experts: Policy | None = None
    degraded: Degraded | None = None


class WeightVersion(BaseModel):
    """The version, an epoch's id, that computed the output tokens [start, end)."""

    version: str
    start: int
    end: int


class CompletionLogprobs(BaseModel):
    """Four lists of the same length, with one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    weight_versions: list[WeightVersion] | None = None


class CompletionReply(BaseModel):
    """A whole reply, or one chunk of a stream: both have the same shape."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    epoch: str
    moesaic: Computation | None = None
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    weight_versions: list[WeightVersion] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    weight_versions: list[WeightVersion] | None = None


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    epoch: str
    moesaic: Computation | None = None
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    epoch: str
    moesaic: Computation | None = None
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class SamplingDefaults(BaseModel):
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    # The model that this one was made from, and its parent. vLLM has them for adapters.
    root: str
    parent: str | None
    max_model_len: int
    # What a request that sets none of them is sampled with.
    sampling_defaults: SamplingDefaults


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class TokenizeReply(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeReply(BaseModel):
    prompt: str


class Index(BaseModel):
    """What the server is, for whoever opens its address."""

    name: str
    version: str
    routes: list[str]
    # The description of the routes and their bodies.
    openapi: str


class Version(BaseModel):
    version: str
