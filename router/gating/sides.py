"""On which side of a share something falls: by a hash, so that all routers agree and nothing is drawn."""

from __future__ import annotations

from hashlib import blake2b


def point_of(text: str, purpose: bytes = b"canary") -> float:
    """A number in [0, 1) that depends on the text alone, and for every purpose in another way."""
    digest = blake2b(text.encode(), digest_size=8, person=purpose).digest()
    return int.from_bytes(digest, "big") / 2**64
