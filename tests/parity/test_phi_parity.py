"""Phi in its old layout gives what transformers gives from the new one; Phixtral what a few plain lines give."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from safetensors.torch import load_file
from support.local_router import local_router, lonely_router
from support.phi_checkpoints import write_old_phi, write_phixtral
from support.processes import running_workers
from support.random_models import random_model, reference_logits, write_model

from moesaic.families import DenseLayers

LOGITS_TOLERANCE = 1e-4
NUM_NEW = 12


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "goldens" / "phi-2"


def inputs_of(golden: Path) -> list[list[int]]:
    return load_file(golden / "inputs.safetensors")["input_ids"].tolist()


@pytest.mark.shared
@pytest.mark.parametrize("dense_layers", ["router", "experts"])
def test_the_old_layout_gives_the_logits_and_tokens_of_the_reference(
    golden: Path, tmp_path: Path, dense_layers: DenseLayers
) -> None:
    folder = write_old_phi(tmp_path, golden / "checkpoint")
    router = lonely_router(folder, dense_layers=dense_layers)
    expected = load_file(golden / "expected.safetensors")
    for options in ({}, {"max_batch_tokens": 7}):
        logits, tokens = router.run(inputs_of(golden), num_new=NUM_NEW, **options)
        for index, (rows, output) in enumerate(zip(logits, tokens, strict=True)):
            wanted = expected["logits"][index]
            torch.testing.assert_close(rows[: len(wanted)], wanted, atol=LOGITS_TOLERANCE, rtol=0)
            assert output == expected["greedy_tokens"][index].tolist()


@pytest.mark.shared
@pytest.mark.parametrize(("num_slots", "top_k"), [(2, 2), (4, 2), (3, 1)])
def test_phixtral_gives_the_logits_of_a_plain_computation(
    golden: Path, tmp_path: Path, num_slots: int, top_k: int
) -> None:
    folder = write_phixtral(tmp_path, golden / "checkpoint", num_slots=num_slots, top_k=top_k, seed=5)
    prompts = inputs_of(golden)
    with (
        running_workers(folder, ["0", f"1-{num_slots - 1}"]) as workers,
        local_router(folder, [worker.address for worker in workers]) as router,
    ):
        logits, tokens = router.run(prompts, num_new=NUM_NEW)
    for prompt, rows, output in zip(prompts, logits, tokens, strict=True):
        wanted = phixtral_logits(folder, prompt + output)[: len(rows)]
        torch.testing.assert_close(rows, wanted, atol=LOGITS_TOLERANCE, rtol=0)
        assert output == wanted[len(prompt) - 1 :].argmax(-1).tolist()[:NUM_NEW]


@pytest.mark.shared
def test_equal_gates_as_published_take_the_lowest_slots_in_equal_parts(golden: Path, tmp_path: Path) -> None:
    source = golden / "checkpoint"
    folder = write_phixtral(tmp_path, source, num_slots=4, top_k=2, seed=5, equal_gates=True)
    (prompt, _) = inputs_of(golden)
    ((rows,), _) = lonely_router(folder).run([prompt])
    wanted = phixtral_logits(folder, prompt, slots=(0, 1))
    torch.testing.assert_close(rows, wanted, atol=LOGITS_TOLERANCE, rtol=0)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    heads=st.sampled_from([(2, 2), (4, 2), (6, 1)]),
    head_dim=st.sampled_from([6, 8, 20]),
    rotary_dim=st.sampled_from([2, 4, 6]),
    activation=st.sampled_from(["gelu_new", "gelu", "relu"]),
    normed=st.booleans(),
    dense_layers=st.sampled_from(["router", "experts"]),
    seed=st.integers(0, 1000),
)
def test_a_random_phi_gives_the_logits_of_transformers_in_both_layouts(
    heads: tuple[int, int],
    head_dim: int,
    rotary_dim: int,
    activation: str,
    normed: bool,
    dense_layers: DenseLayers,
    seed: int,
) -> None:
    num_heads, num_kv_heads = heads
    share = rotary_dim / head_dim
    model = random_model(
        "phi",
        seed,
        vocab_size=64,
        hidden_size=num_heads * head_dim,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=64,
        hidden_act=activation,
        qk_layernorm=normed,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share},
    )
    # A share that transformers rounds down to fewer dimensions is another model.
    assume(int(head_dim * share) == rotary_dim)
    prompt = torch.randint(64, (37,), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = reference_logits(model, prompt)
    with tempfile.TemporaryDirectory() as parent:
        folders = [write_model(model, Path(parent) / "new")]
        if not normed:  # which the old layout does not know
            folders.append(write_old_phi(Path(parent) / "old", folders[0], n_head_kv=num_kv_heads))
        for folder in folders:
            ((rows,), _) = lonely_router(folder, dense_layers=dense_layers).run([prompt], max_batch_tokens=16)
            torch.testing.assert_close(rows, wanted, atol=LOGITS_TOLERANCE, rtol=0)


def phixtral_logits(folder: Path, tokens: list[int], slots: tuple[int, ...] | None = None) -> torch.Tensor:
    """[T, V] of Phixtral by the notes on it. `slots`: chosen for every token in equal parts, whatever the gate says."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    w = load_file(folder / "model.safetensors")
    size, heads, eps = config["n_embd"], config["n_head"], config["layer_norm_epsilon"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (size,), w[name + ".weight"], w[name + ".bias"], eps)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        """[T, H, d]: the first dimensions of each head turn, in two halves."""
        n = config["rotary_dim"]
        angles = torch.arange(len(tokens))[:, None] / 10000 ** (torch.arange(0, n, 2) / n)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = x[..., : n // 2], x[..., n // 2 : n]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., n:]), -1)

    def experts(x: torch.Tensor, block: str) -> torch.Tensor:
        logits = x @ w[block + "moe.gate.weight"].T
        best, chosen = logits.sort(dim=-1, descending=True, stable=True)
        top_k = config["num_experts_per_tok"]
        weights, chosen = best[:, :top_k].softmax(-1), chosen[:, :top_k]
        if slots is not None:
            weights, chosen = torch.full_like(weights, 1 / top_k), torch.tensor([slots] * len(x))
        answers = torch.stack(
            [
                linear(
                    F.gelu(linear(x, f"{block}moe.mlp.{e}.fc1"), approximate="tanh"),
                    f"{block}moe.mlp.{e}.fc2",
                )
                for e in range(config["num_local_experts"])
            ],
            dim=1,
        )
        return (answers[torch.arange(len(x))[:, None], chosen] * weights[..., None]).sum(1)

    x = w["transformer.embd.wte.weight"][tokens]
    for layer in range(config["n_layer"]):
        block = f"transformer.h.{layer}."
        h = norm(x, block + "ln")
        q, k, v = linear(h, block + "mixer.Wqkv").view(len(tokens), 3, heads, -1).unbind(1)
        q, k, v = (part.transpose(0, 1) for part in (rotated(q), rotated(k), v))
        mixed = (
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(len(tokens), size)
        )
        x = x + linear(mixed, block + "mixer.out_proj") + experts(h, block)
    return linear(norm(x, "lm_head.ln"), "lm_head.linear")
