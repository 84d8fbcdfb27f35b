"""The sampling part of a request, with every bound checked and every default filled in.

What concerns tokens goes to the engine, what concerns text stays with the service. Errors name fields as the
HTTP API does. Their messages name the field (of a bias also the token) and its bounds, never the value.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field, replace

from moesaic.errors import InvalidArgument, Unsupported
from moesaic.v1 import inference_pb2
from router.api.sampling_defaults import MAX_REPETITION_PENALTY, completed, neutral_sampling
from router.engine.sampling_params import SamplingParams

MAX_CONTINUATIONS = 64
MAX_LOGPROBS = 20
MAX_STOPS = 128
MAX_STOP_CHARS = 256
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """The properties of a model that bound its requests."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    # Whether prompts are read by an encoder, which predicts none of their tokens.
    encodes_prompts: bool = False
    # What a request that sets no sampling parameters is sampled with.
    sampling_defaults: inference_pb2.SamplingParams = field(default_factory=neutral_sampling)


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How the text of a continuation is made and where it stops. `stop_token_ids` are the request's own."""

    stop: tuple[str, ...]
    stop_token_ids: frozenset[int]
    include_stop: bool
    skip_special_tokens: bool


def parse_sampling(
    message: inference_pb2.SamplingParams, *, num_prompt_tokens: int, limits: ModelLimits
) -> tuple[SamplingParams, TextOptions]:
    """Checks a request's sampling parameters against the bounds of inference.proto and of the model.

    Raises InvalidArgument that names the field; Unsupported for what this kind of model does not have.
    """
    if limits.encodes_prompts and message.HasField("prompt_logprobs"):
        raise encoded("prompt_logprobs")
    message = completed(message, limits.sampling_defaults)
    text = _text_options(message, limits)
    max_tokens = _max_tokens(message, num_prompt_tokens, limits)
    _require(message.min_tokens <= max_tokens, "min_tokens", f"must be in [0, max_tokens = {max_tokens}]")
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=message.min_tokens,
        temperature=_temperature(message),
        top_p=_within("top_p", message.top_p, 0, 1),
        top_k=min(message.top_k, limits.vocab_size),
        min_p=_within("min_p", message.min_p, 0, 1),
        presence_penalty=_penalty("presence_penalty", message.presence_penalty),
        frequency_penalty=_penalty("frequency_penalty", message.frequency_penalty),
        repetition_penalty=_within(
            "repetition_penalty", message.repetition_penalty, 0, MAX_REPETITION_PENALTY, above=True
        ),
        seed=message.seed if message.HasField("seed") else secrets.randbits(63),
        stop_token_ids=text.stop_token_ids | (frozenset() if message.ignore_eos else limits.eos_token_ids),
        logit_bias=_logit_bias(message, limits),
        logprobs=_num_logprobs("logprobs", message),
        prompt_logprobs=_num_logprobs("prompt_logprobs", message),
    )
    # If every token stopped, min_tokens would leave none to choose.
    selectable = limits.vocab_size - len(params.stop_token_ids)
    _require(
        selectable > 0 or not params.min_tokens, "stop_token_ids", "must leave a token that does not stop"
    )
    return params, text


def num_continuations(n: int) -> int:
    """The number of continuations of a request. `n` is 0 where it is absent. Raises InvalidArgument."""
    _require(n <= MAX_CONTINUATIONS, "n", f"must be in [1, {MAX_CONTINUATIONS}]")
    return n or 1


def continuation_params(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of continuation `index`: each has its own seed, and only the first scores the prompt."""
    seed = (params.seed + index + 2**63) % 2**64 - 2**63
    return replace(params, seed=seed, prompt_logprobs=params.prompt_logprobs if index == 0 else None)


def check_token_ids(field: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    """Raises InvalidArgument if one of them is not in the vocabulary."""
    in_range = not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size)
    _require(in_range, field, f"token id out of range, must be in [0, {vocab_size - 1}]")


def context_exceeded(max_model_len: int, details: str) -> InvalidArgument:
    """The error for a prompt that does not fit. Clients recognise it by this wording."""
    return InvalidArgument(
        f"prompt: this model's maximum context length is {max_model_len} tokens, {details}",
        field="prompt",
        reason="CONTEXT_LENGTH_EXCEEDED",
    )


def encoded(field: str) -> Unsupported:
    """The error for a request that expects the answer to continue a prompt that an encoder reads."""
    return Unsupported(
        f"{field}: an encoder reads this model's prompts, and a decoder answers: nothing continues a prompt",
        field=field,
    )


def _max_tokens(message: inference_pb2.SamplingParams, num_prompt_tokens: int, limits: ModelLimits) -> int:
    left = limits.max_model_len - num_prompt_tokens
    if not message.HasField("max_tokens"):
        if left < 1:
            raise context_exceeded(limits.max_model_len, f"but the prompt has {num_prompt_tokens}")
        return left
    if message.max_tokens > left:
        details = f"but the prompt has {num_prompt_tokens} and max_tokens asks for {message.max_tokens} more"
        raise context_exceeded(limits.max_model_len, details)
    return message.max_tokens


def _text_options(message: inference_pb2.SamplingParams, limits: ModelLimits) -> TextOptions:
    stop = tuple(message.stop)
    _require(len(stop) <= MAX_STOPS, "stop", f"must be at most {MAX_STOPS} strings")
    fits = all(0 < len(string) <= MAX_STOP_CHARS and "\0" not in string for string in stop)
    _require(fits, "stop", f"every string must have 1 to {MAX_STOP_CHARS} characters, none of them NUL")
    check_token_ids("stop_token_ids", tuple(message.stop_token_ids), limits.vocab_size)
    skip = message.skip_special_tokens if message.HasField("skip_special_tokens") else True
    return TextOptions(stop, frozenset(message.stop_token_ids), message.include_stop_in_output, skip)


def _temperature(message: inference_pb2.SamplingParams) -> float:
    temperature = message.temperature
    _require(math.isfinite(temperature) and temperature >= 0, "temperature", "must be a finite number from 0")
    return temperature


def _penalty(field: str, value: float) -> float:
    return _within(field, value, -MAX_PENALTY, MAX_PENALTY)


def _logit_bias(message: inference_pb2.SamplingParams, limits: ModelLimits) -> dict[int, float]:
    bias = dict(message.logit_bias)
    _require(len(bias) <= MAX_LOGIT_BIASES, "logit_bias", f"must have at most {MAX_LOGIT_BIASES} entries")
    for token_id, value in bias.items():
        in_range = token_id < limits.vocab_size
        _require(
            in_range,
            "logit_bias",
            f"token id {token_id} is out of range, must be in [0, {limits.vocab_size - 1}]",
        )
        is_bounded = -MAX_LOGIT_BIAS <= value <= MAX_LOGIT_BIAS
        _require(
            is_bounded,
            "logit_bias",
            f"the bias of token {token_id} must be in [{-MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}]",
        )
    return bias


def _num_logprobs(field: str, message: inference_pb2.SamplingParams) -> int | None:
    if not message.HasField(field):
        return None
    num: int = getattr(message, field)
    _require(num <= MAX_LOGPROBS, field, f"must be in [0, {MAX_LOGPROBS}]")
    return num


def _within(field: str, value: float, low: float, high: float, *, above: bool = False) -> float:
    """`value`, which must lie in [low, high], or in (low, high] with `above`. NaN lies in neither."""
    inside = (low < value if above else low <= value) and value <= high
    _require(inside, field, f"must be in {'(' if above else '['}{low:g}, {high:g}]")
    return value


def _require(condition: bool, field: str, rule: str) -> None:
    if not condition:
        raise InvalidArgument(f"{field}: {rule}", field=field)
