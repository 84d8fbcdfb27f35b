"""Which pages of other sites may read answers: CORS, for the origins that are named, and for no other.

A browser asks before it sends a request with a JSON body to another origin (a preflight), and shows the page no answer
that does not name its origin. Programs that are no browsers are not concerned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.openai.errors import HttpError

_METHODS = "GET, HEAD, POST"
# For how long a browser may remember the answer to a preflight.
_MAX_AGE_S = 600
# What pages may read beside the body.
_EXPOSED = "x-request-id, retry-after, x-should-retry, x-moesaic-degraded"


@dataclass(frozen=True, slots=True)
class Cors:
    """The origins that are allowed, spelled as browsers spell them."""

    allowed_origins: frozenset[str]

    def is_preflight(self, method: str, headers: Mapping[str, str]) -> bool:
        return method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers

    def refusal(self, headers: Mapping[str, str]) -> HttpError | None:
        """Why a preflight is refused, if it is."""
        if headers["origin"] in self.allowed_origins:
            return None
        return HttpError(
            403,
            "pages of this origin may not read this server's answers: list it in gateway.allowed_origins",
            "Origin",
            "origin_not_allowed",
        )

    def preflight_headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """The answer to a preflight of an allowed origin, beside `headers_for`."""
        found = {
            "access-control-allow-methods": _METHODS,
            "access-control-max-age": str(_MAX_AGE_S),
        }
        if "access-control-request-headers" in headers:
            found["access-control-allow-headers"] = headers["access-control-request-headers"]
        if "access-control-request-private-network" in headers:
            found["access-control-allow-private-network"] = "true"
        return found

    def headers_for(self, headers: Mapping[str, str]) -> dict[str, str]:
        """What every answer to a request with these headers carries."""
        if not self.allowed_origins:
            return {}
        origin = headers.get("origin")
        if origin not in self.allowed_origins:
            return {"vary": "Origin"}
        return {
            "vary": "Origin",
            "access-control-allow-origin": origin,
            "access-control-expose-headers": _EXPOSED,
        }
