"""The n continuations of a request, from their beginning or behind the tokens that a caller has of them.

Pure, and takes time in proportion to these tokens. Errors name the fields of inference.proto.
"""

from __future__ import annotations

from dataclasses import replace

from moesaic.errors import InvalidArgument, Unsupported
from moesaic.v1 import inference_pb2
from router.api.continuation import Continuation
from router.api.prompt import Prompt
from router.api.sampling_request import (
    ModelLimits,
    check_token_ids,
    continuation_params,
    num_continuations,
    parse_sampling,
)
from router.text.text import Text


def make_continuations(
    request: inference_pb2.GenerateRequest,
    prompt: Prompt,
    text: Text,
    limits: ModelLimits,
    *,
    request_id: str,
    model: str,
) -> list[Continuation]:
    """Raises InvalidArgument or Unsupported for what the request asks of sampling, of stops and of a resumption."""
    n = num_continuations(request.n)
    params, options = parse_sampling(request.sampling, num_prompt_tokens=prompt.num_tokens, limits=limits)
    if options.stop and not text.has_tokenizer:
        raise Unsupported("stop: this model has no tokenizer, use stop_token_ids", field="stop")
    resumes = request.HasField("resume")
    if resumes:
        _check_resume(request, n, limits, draws=not params.greedy)
        params = replace(params, prompt_logprobs=None)
    continuations = [
        Continuation(
            index,
            prompt.token_ids,
            text,
            continuation_params(params, index),
            options,
            request_id=request_id,
            model=model,
            continues=not limits.encodes_prompts,
            names_versions=request.return_weight_versions,
            epoch=request.epoch,
        )
        for index in range(n)
    ]
    if resumes:
        for continuation, received in zip(continuations, request.resume.continuations, strict=True):
            continuation.go_on_behind(received.token_ids)
            if received.finished:
                continuation.finished, continuation.ending = True, None
    return continuations


def _check_resume(
    request: inference_pb2.GenerateRequest, n: int, limits: ModelLimits, *, draws: bool
) -> None:
    """Raises InvalidArgument where a request does not say all that it takes to go on with the same answer."""
    received = request.resume.continuations
    if len(received) != n:
        raise InvalidArgument(f"resume: must have as many continuations as n asks for, {n}", field="resume")
    for continuation in received:
        check_token_ids("resume", tuple(continuation.token_ids), limits.vocab_size)
    if not request.epoch:
        raise InvalidArgument("epoch: must be that of the answer that is resumed", field="epoch")
    if draws and not request.sampling.HasField("seed"):
        raise InvalidArgument("seed: must be that of the answer that is resumed", field="seed")
