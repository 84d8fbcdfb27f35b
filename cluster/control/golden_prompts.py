"""How far the model drifts between two epochs on prompts whose answers are known to be good."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import grpc

from moesaic import rpc
from moesaic.errors import FailedPrecondition, InvalidArgument, from_rpc_error
from moesaic.v1 import inference_pb2, inference_pb2_grpc

MAX_PROMPTS = 256
PROMPT_TIMEOUT_S = 60.0


def read_prompts(file: Path) -> tuple[str, ...]:
    """The lines that are not empty. Raises InvalidArgument with field `golden_prompts`."""
    try:
        prompts = tuple(filter(str.strip, file.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(
            f"golden_prompts: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}",
            field="golden_prompts",
        ) from error
    if not 0 < len(prompts) <= MAX_PROMPTS:
        raise InvalidArgument(f"golden_prompts: must be 1 to {MAX_PROMPTS} lines", field="golden_prompts")
    return prompts


async def measure_drift(router: str, prompts: Sequence[str], epochs: tuple[str, str]) -> float:
    """The mean absolute difference of the log probabilities of all prompts' tokens, in nats a token.

    `router` is HOST:PORT of one that holds both epochs. Raises MoesaicError.
    """
    total, tokens = 0.0, 0
    async with rpc.aio_channel(router) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for prompt in prompts:
            old, new = [await _logprobs(stub, prompt, epoch) for epoch in epochs]
            if len(old) != len(new):
                raise FailedPrecondition("the router answered with another number of tokens")
            total += sum(abs(one - other) for one, other in zip(old, new, strict=True))
            tokens += len(old)
    return total / tokens if tokens else 0.0


async def _logprobs(stub: inference_pb2_grpc.InferenceServiceStub, prompt: str, epoch: str) -> list[float]:
    """Of the tokens of the prompt, without the first."""
    sampling = inference_pb2.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    request = inference_pb2.GenerateRequest(text=prompt, epoch=epoch, sampling=sampling)
    logprobs: list[float] = []
    try:
        async for answer in stub.Generate(request, timeout=PROMPT_TIMEOUT_S):
            prompt_logprobs = rpc.received(answer).prompt.logprobs
            logprobs += [token.logprob for token in prompt_logprobs if token.HasField("logprob")]
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    return logprobs
