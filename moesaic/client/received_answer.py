"""What has arrived of the answer to one request, and the request for the rest of it. Pure.

Clients and gateway use it when a router dies in the middle of an answer. Before the first token the request is
sent as it was: nobody has seen anything of the answer, and another run is as good. After it the request says
what has arrived, and the next router goes on behind that: no token comes twice, none is left out.
"""

from __future__ import annotations

from collections import defaultdict

from moesaic.errors import DataLoss
from moesaic.v1 import inference_pb2 as pb


class ReceivedAnswer:
    """`take` every message of an answer, then ask with `next_request` after the stream has broken off."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        self._request = request
        self._opening: pb.GenerateResponse | None = None
        # By index: what has arrived of each continuation.
        self._received: defaultdict[int, pb.ReceivedContinuation] = defaultdict(pb.ReceivedContinuation)

    @property
    def begun(self) -> bool:
        """Whether a token, or the end of a continuation, has arrived."""
        return any(it.token_ids or it.finished for it in self._received.values())

    @property
    def complete(self) -> bool:
        """Whether every continuation has ended, so that nothing is left to ask for."""
        return sum(it.finished for it in self._received.values()) == self._num_continuations

    @property
    def num_tokens(self) -> int:
        return sum(len(it.token_ids) for it in self._received.values())

    def take(self, message: pb.GenerateResponse) -> None:
        """Raises DataLoss for a message that does not belong behind those before it."""
        if message.HasField("prompt"):
            self._open(message)
        elif self._opening is None:
            raise DataLoss("the answer has no beginning", reason="INCOMPLETE_ANSWER")
        elif message.epoch != self._opening.epoch:
            raise DataLoss("the answer changed its epoch", reason="INCOMPLETE_ANSWER")
        received = self._received[message.index]
        received.token_ids.extend(message.token_ids)
        received.finished |= message.finish_reason != pb.FINISH_REASON_UNSPECIFIED

    def next_request(self) -> pb.GenerateRequest:
        """What to ask a router for: the whole answer, or what is missing of it."""
        opening = self._opening
        if opening is None or not self.begun:
            return self._request
        request = pb.GenerateRequest()
        request.CopyFrom(self._request)
        # The tokens instead of the text, because rendering a conversation again may give another text.
        request.token_ids.ids[:] = opening.prompt.token_ids
        request.request_id, request.epoch = opening.request_id, opening.epoch
        if opening.HasField("seed"):
            request.sampling.seed = opening.seed
        request.resume.continuations.extend(self._received[i] for i in range(self._num_continuations))
        return request

    @property
    def _num_continuations(self) -> int:
        return self._request.n or 1

    def _open(self, message: pb.GenerateResponse) -> None:
        """Takes the beginning of an answer, which may begin anew as long as no token of it has arrived."""
        if self.begun:
            raise DataLoss("a router that had to go on with an answer began it anew", reason="NOT_RESUMED")
        self._opening = message
