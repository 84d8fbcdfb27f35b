"""Every reference model as a client meets it: a router process, worker processes, and the public API between.

Greedy tokens are the reference's own, and so are the log probabilities of what was chosen and of what was not.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import running_router, running_workers

from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.client.sync_client import SyncClient
from moesaic.families import describe_model

pytestmark = pytest.mark.shared

TOLERANCE = 1e-4
NUM_TOP = 5

FOLDERS = (
    "mixtral/hf_v4",
    "mixtral/hf_v5_fused",
    "mixtral/mistral_native",
    "mistral-sliding-window/mistral_native",
    "mistral-dense/checkpoint",
    "stripedhyena/checkpoint",
    "phi-2/checkpoint",
    "qwen2-moe/checkpoint",
    "qwen3-moe/checkpoint",
    "olmoe/checkpoint",
    "flex-olmo/checkpoint",
    "deepseek-v3/checkpoint",
    "gpt-oss/checkpoint",
    "switch-transformers/checkpoint",
    "nllb-moe/checkpoint",
)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_client_gets_the_tokens_and_log_probabilities_of_the_reference(shared: Path, folder: str) -> None:
    model = shared / "goldens" / folder
    prompts = load_file(model.parent / "inputs.safetensors")["input_ids"].tolist()
    expected = load_file(model.parent / "expected.safetensors")
    scores = expected["greedy_logits"].log_softmax(-1)
    with (
        running_workers(model, shares_of(model)) as workers,
        running_router(model, workers) as router,
        SyncClient(router.address) as client,
    ):
        for prompt, tokens, row in zip(prompts, expected["greedy_tokens"].tolist(), scores, strict=True):
            answer = list(
                client.generate(prompt, max_tokens=12, temperature=0, ignore_eos=True, logprobs=NUM_TOP)
            )
            assert [token for part in answer for token in part.token_ids] == tokens
            entries = [entry for part in answer for entry in part.logprobs]
            for entry, wanted in zip(entries, row, strict=True):
                said = torch.tensor([top.logprob for top in entry.top])
                torch.testing.assert_close(said, wanted.topk(NUM_TOP).values, atol=TOLERANCE, rtol=0)


def shares_of(model: Path) -> list[str]:
    """Two workers with unequal shares: of every layer's slots, or of the layers where each has but one."""
    num_slots = describe_model(open_checkpoint(model)).num_slots
    most, layers = max(num_slots.values()), list(num_slots)
    if most > 1:
        return ["0", f"1-{most - 1}"]
    return [f"{layers[0]}:0", ",".join(f"{layer}:0" for layer in layers[1:])]
