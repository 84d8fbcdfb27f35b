"""Mixtral's whole context, read in chunks by a router process: exact, and in memory that does not grow with its square."""

from __future__ import annotations

from pathlib import Path

import torch
from support.checkpoints import random_mixtral, write_mixtral
from support.processes import running_router, running_workers

from moesaic.client.sync_client import SyncClient

CONTEXT = 32768
NUM_NEW = 4
# Of what a chunk needs beside the cache: scores of a call, activations, buffers.
MOST_WORKING_BYTES = 128 << 20
TOLERANCE = 1e-4


def test_a_prompt_of_32k_tokens_is_served_with_bounded_memory(tmp_path: Path) -> None:
    model = write_mixtral(tmp_path, max_position_embeddings=CONTEXT)
    prompt = torch.randint(96, (CONTEXT - NUM_NEW,), generator=torch.Generator().manual_seed(0)).tolist()
    with (
        running_workers(model, ["0-1", "2-3"]) as workers,
        running_router(model, workers) as router,
        SyncClient(router.address) as client,
    ):
        # What is there before: code, weights, the buffers of a short step.
        client.complete(prompt[:600], max_tokens=1, temperature=0)
        before = reset_peak_memory(router.pid)
        answer = client.complete(prompt, max_tokens=NUM_NEW, temperature=0, ignore_eos=True, logprobs=1)
        grown = peak_memory(router.pid) - before
        stats = client.router_stats()
    token_bytes = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, float32
    assert grown < CONTEXT * token_bytes + MOST_WORKING_BYTES
    assert stats.steps > CONTEXT // 512
    tokens = list(answer.token_ids)
    assert len(tokens) == NUM_NEW
    reference = random_mixtral(max_position_embeddings=CONTEXT)
    reference.set_attn_implementation("sdpa")
    with torch.inference_mode():
        output = reference(torch.tensor([prompt + tokens[:-1]]), logits_to_keep=NUM_NEW)
    scores = output.logits[0].log_softmax(-1)
    assert scores.argmax(-1).tolist() == tokens
    said = torch.tensor([entry.logprob for entry in answer.logprobs])
    torch.testing.assert_close(said, scores.amax(-1), atol=TOLERANCE, rtol=0)


def reset_peak_memory(pid: int) -> int:
    """Bytes that the process has now, from which its peak counts again."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak_memory(pid)


def peak_memory(pid: int) -> int:
    """The most bytes that were resident at once."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
