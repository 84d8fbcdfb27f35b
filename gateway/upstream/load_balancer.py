"""The choice of a router for each request. Pure.

The load of a router is the work of the gateway's own requests that have not ended. A request goes to the
least loaded router, unless an earlier prompt with the same beginning went to another one. That router holds
the prefix in its cache and keeps receiving such requests until it is clearly busier than the rest. A hash of
the prompt decides between equally loaded routers, so that several gateways send equal prompts to the same
router.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

from moesaic.v1 import inference_pb2 as pb

# The length of the compared beginning of a prompt, in characters or token ids. A shorter cached prefix is not
# worth a busier router.
HEAD_LENGTH = 256
# A prompt of this many tokens weighs as much as another sequence.
TOKENS_PER_SEQUENCE = 512
CHARS_PER_TOKEN = 4
# A router keeps its prefixes until its load exceeds its share by this factor.
BUSIER = 1.25
# The number of prefixes whose router is remembered.
MAX_PREFIXES = 4096


@dataclass(frozen=True, slots=True)
class Demand:
    """The facts about a request that the choice depends on. `prefix`: a hash of the prompt's beginning, and of
    everything that keeps routers from computing it with the cached prefix of another request."""

    prefix: bytes
    # The work, in units of one sequence.
    weight: float

    @classmethod
    def of(cls, request: pb.GenerateRequest) -> Demand:
        head, num_tokens = _read_prompt(request)
        digest = blake2b(digest_size=16)
        for part in (request.tenant, request.epoch, head):
            digest.update(part.encode(errors="surrogatepass") + b"\0")
        if request.HasField("experts"):
            digest.update(_policy_key(request.experts))
        return cls(digest.digest(), max(request.n, 1) + num_tokens / TOKENS_PER_SEQUENCE)


class LoadBalancer:
    """The load of each router by name, and the router that each recent prefix went to."""

    def __init__(self, names: Iterable[str]) -> None:
        self._loads = dict.fromkeys(names, 0.0)
        # The router of each prefix, the least recently used prefix first.
        self._homes: dict[bytes, str] = {}

    def take(self, demand: Demand, candidates: Collection[str]) -> str:
        """One of `candidates`, never empty. The request counts as the router's load until `release`."""
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
    """Rendezvous hashing: adding or removing a router keeps the order of the others for each prefix."""
    return blake2b(prefix + name.encode(), digest_size=8).digest()


def _policy_key(policy: pb.ExpertPolicy) -> bytes:
    """The same for policies that differ in the order of their entries alone. `require` changes no answer."""
    top_k = policy.top_k if policy.HasField("top_k") else None
    deny, allow = (sorted(set(entries)) for entries in (policy.deny, policy.allow))
    return pb.ExpertPolicy(deny=deny, allow=allow, top_k=top_k).SerializeToString(deterministic=True)


def _read_prompt(request: pb.GenerateRequest) -> tuple[str, float]:
    """The beginning of the prompt, and an estimate of its number of tokens."""
    match request.WhichOneof("prompt"):
        case "token_ids":
            ids = request.token_ids.ids
            return " ".join(map(str, islice(ids, HEAD_LENGTH))), len(ids)
        case "text":
            return request.text[:HEAD_LENGTH], len(request.text) / CHARS_PER_TOKEN
        case _:
            return _opening(request.chat), _length(request.chat) / CHARS_PER_TOKEN


def _opening(chat: pb.Chat) -> str:
    """The part that stays the same as the conversation grows: everything up to the first user message."""
    opening = ""
    for message in chat.messages:
        opening += f"{message.role}\0{_content(message)}\0"
        if message.role == "user" or len(opening) >= HEAD_LENGTH:
            break
    return opening[:HEAD_LENGTH]


def _length(chat: pb.Chat) -> int:
    return sum(len(_content(message)) for message in chat.messages)


def _content(message: pb.ChatMessage) -> str:
    return message.content or "".join(part.text for part in message.parts)
