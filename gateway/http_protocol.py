"""uvicorn's HTTP/1.1 without the leniency in which two servers read one request differently.

A proxy and the server behind it must agree where a request ends, or a second one can be smuggled past the proxy. So
what RFC 9112 lets a server refuse is refused: a length beside chunks (section 6.1), lines that end without CR (2.2),
and header lines that are folded (5.2). Every refusal has the API's envelope and closes the connection.
"""

from __future__ import annotations

import json
import re
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway.openai.errors import HttpError

_END_OF_HEAD = re.compile(rb"\n\r?\n")
_BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
_FOLDED_LINE = re.compile(rb"\n[ \t]")


class StrictProtocol(H11Protocol):
    """One connection."""

    conn: StrictConnection

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = StrictConnection(h11.SERVER)

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no request, or a body that breaks the rules: uvicorn's own answer is plain text."""
        if self.cycle is not None:
            # The request that the body belongs to: its handler learns that nobody reads its answer.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in _refusal(self.conn.fault or "this is not a valid HTTP/1.1 request"):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class StrictConnection(h11.Connection):
    """h11's connection of a server; `fault` says why a request was refused, where that is our own rule."""

    fault: str | None = None

    def next_event(self) -> Any:
        if self.their_state is h11.IDLE:
            self._refuse(_fault_of_head(self.trailing_data[0]))
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._refuse(_fault_of_framing(event))
        return event

    def _refuse(self, fault: str | None) -> None:
        if fault is not None:
            self.fault = fault
            raise h11.RemoteProtocolError(fault)


def _fault_of_head(received: bytes) -> str | None:
    """What is wrong with the lines before the body, as far as they have arrived."""
    end = _END_OF_HEAD.search(received)
    head = received[: end.end()] if end else received
    if _BARE_LINE_FEED.search(head):
        return "a line of the request does not end with CR LF"
    return "a header of the request is folded" if _FOLDED_LINE.search(head) else None


def _fault_of_framing(request: h11.Request) -> str | None:
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" not in names:
        return None
    if b"content-length" in names:
        return "the request has both Content-Length and Transfer-Encoding"
    return "HTTP/1.0 has no Transfer-Encoding" if request.http_version < b"1.1" else None


def _refusal(message: str) -> list[h11.Response | h11.Data | h11.EndOfMessage]:
    error = HttpError(400, message, None, "bad_request")
    body = json.dumps(error.envelope).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers,
    }
    return [
        h11.Response(status_code=400, headers=list(headers.items()), reason=b"Bad Request"),
        h11.Data(data=body),
        h11.EndOfMessage(),
    ]
