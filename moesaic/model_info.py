"""The model that a router serves, as a frozen value of the client library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from moesaic.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request that sets none of them is sampled with."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float

    @classmethod
    def from_pb(cls, sampling: pb.SamplingParams) -> Self:
        return cls(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
        )


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that a router serves."""

    model: str
    version: str
    family: str
    max_model_len: int
    vocab_size: int
    num_layers: int
    num_experts: int
    num_experts_per_token: int
    epoch: str
    has_tokenizer: bool
    has_chat_template: bool
    eos_token_ids: tuple[int, ...]
    # Seconds since 1970, when the router became ready.
    created: int
    # The controller that this router follows; empty when its workers were named by hand.
    control_address: str
    # Whether an encoder reads the prompt. Such a model supports neither chat nor echo nor prompt_logprobs.
    encodes_prompts: bool
    sampling_defaults: SamplingDefaults

    @classmethod
    def from_pb(cls, info: pb.GetModelInfoResponse) -> Self:
        return cls(
            model=info.model,
            version=info.version,
            family=info.family,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            num_layers=info.num_layers,
            num_experts=info.num_experts,
            num_experts_per_token=info.num_experts_per_token,
            epoch=info.epoch,
            has_tokenizer=info.has_tokenizer,
            has_chat_template=info.has_chat_template,
            eos_token_ids=tuple(info.eos_token_ids),
            created=info.created,
            control_address=info.control_address,
            encodes_prompts=info.encodes_prompts,
            sampling_defaults=SamplingDefaults.from_pb(info.sampling_defaults),
        )
