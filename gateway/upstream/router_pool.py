"""Which router a request goes to. Pure: loads are what the gateway itself has sent and not yet seen end.

The least loaded router gets a request, unless its prompt begins like one that went to another router lately: that one
holds the prefix in its cache, and keeps such requests until it is clearly busier than the rest. Among equals a hash of
the prompt decides, so that gateways side by side send equal prompts the same way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

from moesaic.v1 import inference_pb2 as pb

# How far a prompt is looked at, in characters or token ids: about what makes a cached prefix worth a detour.
HEAD_LENGTH = 256
# A prompt of this many tokens weighs as much as another sequence.
TOKENS_PER_SEQUENCE = 512
CHARS_PER_TOKEN = 4
# A router keeps a prefix until it carries this much more than its share.
BUSIER = 1.25
# Prefixes of which it is remembered where they went.
MAX_PREFIXES = 4096


@dataclass(frozen=True, slots=True)
class Demand:
    """What the choice needs to know of a request: how its prompt begins, hashed, and how much work it is."""

    prefix: bytes
    # In sequences.
    weight: float

    @classmethod
    def of(cls, request: pb.GenerateRequest) -> Demand:
        head, num_tokens = _read_prompt(request)
        digest = blake2b(digest_size=16)
        for part in (request.tenant, head):
            digest.update(part.encode(errors="surrogatepass") + b"\0")
        return cls(digest.digest(), max(request.n, 1) + num_tokens / TOKENS_PER_SEQUENCE)


class RouterPool:
    """The routers by name, what each carries, and where prefixes went."""

    def __init__(self, names: Iterable[str]) -> None:
        self._loads = dict.fromkeys(names, 0.0)
        # Least recently used first.
        self._homes: dict[bytes, str] = {}

    def take(self, demand: Demand, candidates: Collection[str]) -> str:
        """One of `candidates`, which must not be empty; it carries the request until `release`."""
        name = self._choose(demand, candidates)
        self._remember(demand.prefix, name)
        self._loads[name] += demand.weight
        return name

    def release(self, name: str, demand: Demand) -> None:
        self._loads[name] -= demand.weight

    def _choose(self, demand: Demand, candidates: Collection[str]) -> str:
        home = self._homes.get(demand.prefix)
        share = (sum(self._loads[name] for name in candidates) + demand.weight) / len(candidates)
        if home is not None and home in candidates and self._loads[home] < BUSIER * share:
            return home
        return min(candidates, key=lambda name: (self._loads[name], _rank(demand.prefix, name)))

    def _remember(self, prefix: bytes, name: str) -> None:
        self._homes.pop(prefix, None)
        self._homes[prefix] = name
        if len(self._homes) > MAX_PREFIXES:
            del self._homes[next(iter(self._homes))]


def _rank(prefix: bytes, name: str) -> bytes:
    """Rendezvous: every prefix has an order of its own for the routers, which no other router's coming or going changes."""
    return blake2b(prefix + name.encode(), digest_size=8).digest()


def _read_prompt(request: pb.GenerateRequest) -> tuple[str, float]:
    """The head of the prompt and about how many tokens it has."""
    match request.WhichOneof("prompt"):
        case "token_ids":
            ids = request.token_ids.ids
            return " ".join(map(str, islice(ids, HEAD_LENGTH))), len(ids)
        case "text":
            return request.text[:HEAD_LENGTH], len(request.text) / CHARS_PER_TOKEN
        case _:
            return _opening(request.chat), _length(request.chat) / CHARS_PER_TOKEN


def _opening(chat: pb.Chat) -> str:
    """What stays as the conversation grows: everything up to its first word of a user."""
    opening = ""
    for message in chat.messages:
        opening += f"{message.role}\0{message.content}\0"
        if message.role == "user" or len(opening) >= HEAD_LENGTH:
            break
    return opening[:HEAD_LENGTH]


def _length(chat: pb.Chat) -> int:
    return sum(len(message.content) for message in chat.messages)
