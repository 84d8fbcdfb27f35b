"""Reply bodies from the pieces of an output: one renderer for completions, one for chat completions.

A renderer belongs to one request. `chunks` renders one piece for a stream, `reply` the whole output at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from google.protobuf.json_format import MessageToDict
from pydantic import BaseModel

from gateway.openai import logprobs, replies
from gateway.openai.request_output import Piece, RequestOutput, join, separate_end
from gateway.openai.requests import ChatCompletionRequest, CompletionRequest, GenerationBody
from moesaic.errors import DataLoss
from moesaic.expert_policy import OnMissing, on_missing_of
from moesaic.v1 import inference_pb2 as pb

# Of whole replies whose answer is not the full one.
DEGRADED_HEADER = "x-moesaic-degraded"


class Renderer(Protocol):
    """The shape of a reply to one request."""

    # The router's name of a field -> its name in this API.
    params: ClassVar[Mapping[str, str]]

    @property
    def request(self) -> GenerationBody: ...

    def calls(self) -> list[pb.GenerateRequest]: ...

    def chunks(self, output: RequestOutput, piece: Piece) -> Sequence[BaseModel]: ...

    def usage_chunk(self, output: RequestOutput) -> BaseModel: ...

    def reply(self, output: RequestOutput, choices: Sequence[Sequence[Piece]]) -> BaseModel: ...


@dataclass(frozen=True, slots=True)
class Identity:
    """The fields that identify a reply."""

    request_id: str
    # Seconds since 1970.
    created: int


class CompletionRenderer:
    """POST /v1/completions."""

    params: ClassVar[Mapping[str, str]] = {
        "prompt_logprobs": "logprobs",
        "include_stop_in_output": "include_stop_str_in_output",
    }

    def __init__(self, request: CompletionRequest, identity: Identity) -> None:
        self.request = request
        self._identity = identity
        # The offset of each choice's next token in the text of the choice.
        self._offsets: dict[int, int] = {}

    def calls(self) -> list[pb.GenerateRequest]:
        return self.request.calls()

    def chunks(self, output: RequestOutput, piece: Piece) -> Sequence[BaseModel]:
        opening = _of_piece(output, piece)
        usage = _chunk_usage(self.request, output)
        return [self._body(output, piece.epoch, choices=[self._choice(piece)], **opening, **usage)]

    def usage_chunk(self, output: RequestOutput) -> BaseModel:
        return self._body(output, output.epoch, choices=[], usage=_usage(output))

    def reply(self, output: RequestOutput, choices: Sequence[Sequence[Piece]]) -> BaseModel:
        rendered = [self._choice(join(pieces)) for pieces in choices]
        epoch = output.epoch
        return self._body(output, epoch, choices=rendered, usage=_usage(output), **_whole_computation(output))

    def _body(self, output: RequestOutput, epoch: str, **fields: Any) -> replies.CompletionReply:
        return replies.CompletionReply(
            id=f"cmpl-{self._identity.request_id}",
            object="text_completion",
            created=self._identity.created,
            model=output.model,
            epoch=epoch,
            **fields,
        )

    def _choice(self, piece: Piece) -> replies.CompletionChoice:
        echo = bool(self.request.echo) and piece.is_first
        optional = _weight_versions(self.request, piece)
        if self.request.return_token_ids:
            optional["token_ids"] = list(piece.token_ids)
            if piece.is_first:
                optional["prompt_token_ids"] = list(piece.prompt.token_ids)
        return replies.CompletionChoice(
            index=piece.index,
            text=piece.prompt.text + piece.text if echo else piece.text,
            logprobs=self._logprobs(piece, echo),
            finish_reason=piece.finish_reason,
            stop_reason=_stop_reason(self.request, piece),
            **optional,
        )

    def _logprobs(self, piece: Piece, echo: bool) -> replies.CompletionLogprobs | None:
        if self.request.logprobs is None:
            return None
        entries = [*piece.prompt.logprobs, *piece.logprobs] if echo else list(piece.logprobs)
        offset = self._offsets.get(piece.index, 0)
        self._offsets[piece.index] = offset + logprobs.num_chars(entries)
        return logprobs.for_completion(entries, offset)


class ChatRenderer:
    """POST /v1/chat/completions."""

    params: ClassVar[Mapping[str, str]] = {
        "prompt": "messages",
        "chat": "messages",
        "template_kwargs": "chat_template_kwargs",
        "logprobs": "top_logprobs",
        "include_stop_in_output": "include_stop_str_in_output",
    }

    def __init__(self, request: ChatCompletionRequest, identity: Identity) -> None:
        self.request = request
        self._identity = identity

    def calls(self) -> list[pb.GenerateRequest]:
        return self.request.calls()

    def chunks(self, output: RequestOutput, piece: Piece) -> Sequence[BaseModel]:
        """As OpenAI: first the role with empty text, then text, then the end of the choice with an empty delta.

        The first chunk says by what the answer is computed, and holds the prompt's token ids where requested.
        """
        usage = _chunk_usage(self.request, output)
        chunks = [
            self._chunk(
                output,
                piece.epoch,
                choices=[self._chunk_choice(part)],
                **usage,
                **_of_piece(output, replace(part, is_first=False)),
            )
            for part in separate_end(piece)
        ]
        if piece.is_first:
            opening = replies.ChatChunkChoice(
                index=piece.index,
                delta=replies.ChatDelta(role="assistant", content=""),
                logprobs=None,
                finish_reason=None,
            )
            first = {**_computation(output, piece.epoch, None), **self._prompt_token_ids(piece)}
            chunks.insert(0, self._chunk(output, piece.epoch, choices=[opening], **usage, **first))
        return chunks

    def usage_chunk(self, output: RequestOutput) -> BaseModel:
        return self._chunk(output, output.epoch, choices=[], usage=_usage(output))

    def reply(self, output: RequestOutput, choices: Sequence[Sequence[Piece]]) -> BaseModel:
        joined = [join(pieces) for pieces in choices]
        return replies.ChatReply(
            **self._head(output, output.epoch),
            object="chat.completion",
            choices=[
                replies.ChatChoice(
                    message=replies.ChatMessage(role="assistant", content=piece.text), **self._common(piece)
                )
                for piece in joined
            ],
            usage=_usage(output),
            **_whole_computation(output),
            **self._prompt_token_ids(joined[0]),
        )

    def _chunk(self, output: RequestOutput, epoch: str, **fields: Any) -> replies.ChatChunk:
        return replies.ChatChunk(**self._head(output, epoch), object="chat.completion.chunk", **fields)

    def _chunk_choice(self, piece: Piece) -> replies.ChatChunkChoice:
        delta = replies.ChatDelta() if piece.finish_reason else replies.ChatDelta(content=piece.text)
        return replies.ChatChunkChoice(delta=delta, **self._common(piece))

    def _head(self, output: RequestOutput, epoch: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self._identity.request_id}",
            "created": self._identity.created,
            "model": output.model,
            "epoch": epoch,
        }

    def _common(self, piece: Piece) -> dict[str, Any]:
        """The fields that a choice and a chunk of it share."""
        num_top = self.request.top_logprobs or 0
        fields: dict[str, Any] = {
            "index": piece.index,
            "logprobs": logprobs.for_chat(piece.logprobs, num_top) if self.request.logprobs else None,
            "finish_reason": piece.finish_reason,
            "stop_reason": _stop_reason(self.request, piece),
            **_weight_versions(self.request, piece),
        }
        if self.request.return_token_ids:
            fields["token_ids"] = list(piece.token_ids)
        return fields

    def _prompt_token_ids(self, piece: Piece) -> dict[str, Any]:
        return {"prompt_token_ids": list(piece.prompt.token_ids)} if self.request.return_token_ids else {}


def _computation(
    output: RequestOutput, epoch: str, degraded: pb.Degraded | None
) -> dict[str, replies.Computation]:
    """By what `epoch` computes an answer, and how far that is not the full one."""
    fields: dict[str, Any] = {}
    if output.experts is not None:
        policy = MessageToDict(output.experts, preserving_proto_field_name=True)
        if output.experts.on_missing:
            policy["on_missing"] = on_missing_of(output.experts.on_missing)
        fields["experts"] = replies.Policy(**policy)
    if degraded is not None:
        fields["degraded"] = replies.Degraded(policy=_stand_in(degraded), assignments=degraded.assignments)
    return {"moesaic": replies.Computation(epoch=epoch, **fields)}


def _whole_computation(output: RequestOutput) -> dict[str, replies.Computation]:
    return _computation(output, output.epoch, output.degraded)


def _of_piece(output: RequestOutput, piece: Piece) -> dict[str, replies.Computation]:
    """The field of the first chunk of a choice, and of the last one where that is not the full answer."""
    if not piece.is_first and piece.degraded is None:
        return {}
    return _computation(output, piece.epoch, piece.degraded)


def degraded_header(degraded: pb.Degraded) -> str:
    """The value of `x-moesaic-degraded`."""
    return f"{_stand_in(degraded)}; assignments={degraded.assignments}"


def _stand_in(degraded: pb.Degraded) -> OnMissing:
    policy = on_missing_of(degraded.policy)
    if policy is None:
        raise DataLoss("the answer is degraded without a policy", reason="BAD_ANSWER")
    return policy


def _weight_versions(request: GenerationBody, piece: Piece) -> dict[str, Any]:
    """The versions that computed the tokens of a choice, at its end, where they are requested."""
    if not request.return_weight_versions or piece.finish_reason is None:
        return {}
    versions = [
        replies.WeightVersion(version=span.version, start=span.start, end=span.end)
        for span in piece.weight_versions
    ]
    return {"weight_versions": versions}


def _usage(output: RequestOutput) -> replies.Usage:
    return replies.Usage(
        prompt_tokens=output.prompt_tokens,
        completion_tokens=output.completion_tokens,
        total_tokens=output.prompt_tokens + output.completion_tokens,
        prompt_tokens_details=replies.PromptTokensDetails(cached_tokens=output.cached_tokens),
    )


def _chunk_usage(request: GenerationBody, output: RequestOutput) -> dict[str, replies.Usage | None]:
    """The counts so far, null where only the last chunk has them, or no field where not requested."""
    options = request.stream_options
    if options is None or not (options.include_usage or options.continuous_usage_stats):
        return {}
    return {"usage": _usage(output) if options.continuous_usage_stats else None}


def _stop_reason(request: GenerationBody, piece: Piece) -> str | int | None:
    """The stop string, or the id of the stop token, that the client named and that ended the choice."""
    if not piece.stop:
        return None
    strings = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if piece.stop in strings:
        return piece.stop
    return (
        int(piece.stop)
        if piece.stop.isdigit() and int(piece.stop) in (request.stop_token_ids or [])
        else None
    )
