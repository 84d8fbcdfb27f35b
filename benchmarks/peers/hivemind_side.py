"""hivemind's side of `hivemind_layer.py`: servers that share eight SwiGLU experts, and a client.

It runs in an environment that has hivemind and not Moesaic, and in a network namespace of its own. Every line
of its input is the number of tokens of a measurement; the answer is a line of JSON with the milliseconds of
each call.

Usage: python hivemind_side.py SERVERS
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from typing import Any

import torch
from hivemind import DHT, RemoteMixtureOfExperts
from hivemind.moe.server import Server
from hivemind.moe.server.layers.custom_experts import register_expert_class
from torch import nn

HIDDEN, INNER, EXPERTS, TOP_K = 1024, 3584, 8, 2
# These are the numbers of hivemind_layer.py.
WARM_UP_S, SPELL_S, MIN_CALLS = 0.5, 1.0, 12
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


@register_expert_class("swiglu", lambda batch, hidden: torch.empty(batch, hidden))
class SwiGlu(nn.Module):
    """The expert of Mixtral."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * INNER, bias=False)
        self.down = nn.Linear(INNER, hidden, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(rows).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


def serve(index: int, servers: int, peers: list[str], ready: Any) -> None:
    """One server process with its share of the experts."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // servers))
    share = EXPERTS // servers
    Server.create(
        expert_uids=[f"expert.{slot}" for slot in range(index * share, (index + 1) * share)],
        expert_cls="swiglu",
        hidden_dim=HIDDEN,
        optim_cls=None,
        num_handlers=2,
        device="cpu",
        initial_peers=peers,
        host_maddrs=[LOOPBACK],
        start=True,
    )
    ready.set()
    time.sleep(24 * 3600)


def main(num_servers: int) -> None:
    torch.set_num_threads(1)
    dht = DHT(start=True, host_maddrs=[LOOPBACK])
    peers = [str(address) for address in dht.get_visible_maddrs()]
    events = [multiprocessing.Event() for _ in range(num_servers)]
    # They are no daemons, because a server starts processes of its own.
    servers = [
        multiprocessing.Process(target=serve, args=(i, num_servers, peers, event))
        for i, event in enumerate(events)
    ]
    try:
        for server in servers:
            server.start()
        if not all(event.wait(120) for event in events):
            sys.exit("a hivemind server did not start")
        layer = RemoteMixtureOfExperts(
            in_features=HIDDEN, grid_size=(EXPERTS,), dht=dht, uid_prefix="expert.", k_best=TOP_K, k_min=TOP_K
        )
        answer({"ready": True})
        for line in sys.stdin:
            answer({"ms": measure(layer, int(line))})
    finally:
        for server in servers:
            server.kill()
        dht.shutdown()


@torch.inference_mode()
def measure(layer: RemoteMixtureOfExperts, tokens: int) -> list[float]:
    """The milliseconds of every call, each with new rows."""
    times: list[float] = []
    counts_from = time.perf_counter() + WARM_UP_S
    while len(times) < MIN_CALLS or time.perf_counter() < counts_from + SPELL_S:
        rows = torch.randn(tokens, HIDDEN)
        started = time.perf_counter()
        layer(rows)
        if started >= counts_from:
            times.append(1000 * (time.perf_counter() - started))
    return times


def answer(message: dict[str, object]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
