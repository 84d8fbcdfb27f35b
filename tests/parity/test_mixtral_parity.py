"""The promise that everything else stands on: experts in other processes, the very numbers of the reference.

Workers are real processes and rows travel over real sockets; the router's model and dispatcher run here, so that every
logit can be compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import random_mixtral, write_mixtral
from support.local_router import local_router
from support.processes import running_workers

LOGITS_TOLERANCE = 1e-4
DECODERS = ("lean", "hf")

# Shares of 8 slots in 2 layers: one worker, even and uneven numbers, layers apart, one worker an expert.
PLACEMENTS = {
    "1": ["all"],
    "2 even": ["0-3", "4-7"],
    "2 by layer": ["0:0-7", "1:0-7"],
    "3 uneven": ["0", "1-2", "3-7"],
    "3 ragged": ["0:0-4,1:0", "0:5,1:1-6", "0:6-7,1:7"],
    "8": [str(slot) for slot in range(8)],
}


# Each in how many of these: one layout in all, the other read whole and in ragged shares.
LAYOUTS = {"hf_v4": tuple(PLACEMENTS), "hf_v5_fused": ("1", "3 ragged")}


@pytest.mark.shared
@pytest.mark.parametrize("layout", LAYOUTS)
def test_goldens_give_the_reference_and_the_very_same_bits_for_every_placement(
    shared: Path, layout: str
) -> None:
    golden = shared / "goldens" / "mixtral"
    inputs = load_file(golden / "inputs.safetensors")["input_ids"].tolist()
    expected = load_file(golden / "expected.safetensors")
    first_rows: dict[str, list[torch.Tensor]] = {}
    for name in LAYOUTS[layout]:
        with running_workers(golden / layout, PLACEMENTS[name]) as workers:
            for decoder in DECODERS:
                with local_router(
                    golden / layout, [worker.address for worker in workers], decoder=decoder
                ) as router:
                    logits, tokens = router.run(inputs, num_new=12)
                    alone = router.run(inputs[:1], num_new=12)
                    chunked = router.run(inputs, num_new=12, max_batch_tokens=7)
                for run_logits, run_tokens in ((logits, tokens), alone, chunked):
                    for index, (rows, output) in enumerate(zip(run_logits, run_tokens, strict=True)):
                        torch.testing.assert_close(
                            rows[: len(inputs[index])],
                            expected["logits"][index],
                            atol=LOGITS_TOLERANCE,
                            rtol=0,
                        )
                        assert output == expected["greedy_tokens"][index].tolist(), (name, decoder)
                first = first_rows.setdefault(decoder, logits)
                assert all(torch.equal(*pair) for pair in zip(logits, first, strict=True)), (name, decoder)


CONFIGS: dict[str, dict[str, Any]] = {
    "grouped queries, top 2": {},
    "multi-head, top 3": {"num_key_value_heads": 4, "num_experts_per_tok": 3, "num_local_experts": 8},
    "one kv head, top 1, tied": {
        "num_key_value_heads": 1,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
    },
    "sliding window": {"sliding_window": 5, "num_local_experts": 8},
    "own head size": {"head_dim": 12, "num_local_experts": 5},
}


@pytest.fixture(scope="module", params=CONFIGS)
def random_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    overrides = CONFIGS[request.param]
    return write_mixtral(tmp_path_factory.mktemp("model"), seed=7, **overrides), overrides


def reference(
    overrides: dict[str, Any], prompts: list[list[int]], num_new: int
) -> list[tuple[torch.Tensor, list[int]]]:
    """transformers alone, one sequence at a time, without a cache: logits of every position, greedy tokens."""
    model = random_mixtral(seed=7, **overrides)
    results = []
    for prompt in prompts:
        tokens = list(prompt)
        with torch.inference_mode():
            for _ in range(num_new):
                logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
                tokens.append(int(logits[-1].argmax()))
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
        results.append((logits, tokens[len(prompt) :]))
    return results


def mixed_prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 96, (1 + 5 * index,), generator=generator).tolist() for index in range(count)]


# Other numbers of workers in one config: processes are slow to start.
@pytest.mark.parametrize(
    ("random_model", "num_workers"),
    [*((name, count) for name in CONFIGS for count in (1, 3)), *(("multi-head, top 3", n) for n in (2, 8))],
    indirect=["random_model"],
)
def test_ten_mixed_requests_at_once_and_one_alone_equal_transformers(
    random_model: tuple[Path, dict[str, Any]], num_workers: int
) -> None:
    folder, overrides = random_model
    prompts = mixed_prompts(10)
    expected = reference(overrides, prompts, 6)
    shares = uneven_shares(2, overrides.get("num_local_experts", 4), num_workers)
    runs = []
    with running_workers(folder, shares) as workers:
        for decoder in DECODERS:
            with local_router(folder, [worker.address for worker in workers], decoder=decoder) as router:
                runs.append((router.run(prompts, num_new=6, max_batch_tokens=64), expected))
                runs.append((router.run(prompts[-1:], num_new=6), expected[-1:]))

    for (logits, tokens), references in runs:
        for rows, output, (expected_rows, expected_tokens) in zip(logits, tokens, references, strict=True):
            assert output == expected_tokens
            torch.testing.assert_close(rows, expected_rows, atol=LOGITS_TOLERANCE, rtol=0)


def test_batch_invariant_logits_are_the_same_bits_alone_or_with_others_whole_or_in_chunks(
    random_model: tuple[Path, dict[str, Any]],
) -> None:
    folder, overrides = random_model
    prompts = mixed_prompts(10)
    shares = uneven_shares(2, overrides.get("num_local_experts", 4), 2)
    with (
        running_workers(folder, shares, "--batch-invariant") as workers,
        local_router(folder, [worker.address for worker in workers], batch_invariant=True) as router,
    ):
        together, _ = router.run(prompts, num_new=6)
        in_sevens, _ = router.run(prompts, num_new=6, max_batch_tokens=7)
        alone = [router.run([prompt], num_new=6)[0][0] for prompt in prompts[3::3]]
        last_in_sevens, _ = router.run(prompts[-1:], num_new=6, max_batch_tokens=7)

    assert all(torch.equal(*pair) for pair in zip(together, in_sevens, strict=True))
    assert all(torch.equal(*pair) for pair in zip(together[3::3], alone, strict=True))
    assert torch.equal(together[-1], last_in_sevens[0])


def uneven_shares(num_layers: int, num_slots: int, num_workers: int) -> list[str]:
    """Every expert once, over workers that hold one more each, as far as there are experts; the last holds the rest."""
    experts = [f"{layer}:{slot}" for slot in range(num_slots) for layer in range(num_layers)]
    shares = []
    for index in range(num_workers):
        workers_after = num_workers - index - 1
        count = len(experts) if not workers_after else min(index + 1, len(experts) - workers_after)
        shares.append(",".join(experts[:count]))
        experts = experts[count:]
    return shares
