"""Low-rank adapters as PEFT writes them, packed as experts of kind lora."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from support.checkpoints import random_mixtral, write_mixtral

from cluster.bundles.model_folder import open_model
from cluster.bundles.order import Order, Packed
from cluster.bundles.pack import pack
from cluster.bundles.selection import Origin, Wanted
from moesaic.bundles import verify
from moesaic.errors import InvalidArgument

RANK, ALPHA = 2, 6
EXPERT = "base_model.model.model.layers.1.block_sparse_moe.experts.3."
ATTENTION = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixtral(tmp_path_factory.mktemp("base") / "mixtral")


def factors(module: str, inputs: int, outputs: int, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        f"{module}lora_A.weight": random.standard_normal((RANK, inputs)).astype("f4"),
        f"{module}lora_B.weight": random.standard_normal((outputs, RANK)).astype("f4"),
    }


def write_adapter(folder: Path, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    """Of gate and down of one expert, unless `tensors` says otherwise."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA} | config))
    own = factors(f"{EXPERT}w1.", 32, 24, 0) | factors(f"{EXPERT}w2.", 24, 32, 1)
    save_file(own if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def packed(adapter: Path, base: Path, out: Path, **order: Any) -> Packed:
    done = pack(Order(adapter, base, out, **order))
    verify(done.bundle, base=open_model(base, "base").as_base())
    return done


def test_factors_become_an_expert_of_kind_lora(tmp_path: Path, base: Path) -> None:
    done = packed(write_adapter(tmp_path / "adapter"), base, tmp_path / "b", wanted=Wanted(into="new"))
    assert done.origin is Origin.ADAPTER
    (expert,) = done.bundle.manifest.experts
    assert (expert.layer, expert.slot, expert.kind) == (1, None, "lora")
    assert expert.weights.keys() == {"gate_a", "gate_b", "down_a", "down_b"}
    assert {key: expert.parameters[key] for key in ("base_slot", "rank", "alpha")} == {
        "base_slot": 3,
        "rank": RANK,
        "alpha": float(ALPHA),
    }
    assert done.bundle.num_bytes < 4096


def test_its_probe_answers_are_those_of_the_merged_weights(tmp_path: Path, base: Path) -> None:
    bundle = packed(write_adapter(tmp_path / "adapter"), base, tmp_path / "b").bundle
    (expert,) = bundle.manifest.experts
    assert (expert.slot, expert.probe is not None) == (3, True)
    module = random_mixtral().model.layers[1].mlp.experts
    gate, up = module.gate_up_proj.data[3].chunk(2)
    merged = {"gate": gate, "down": module.down_proj.data[3]}
    for name, weight in merged.items():
        a, b = (torch.from_numpy(bundle.floats(expert.weights[f"{name}_{factor}"])) for factor in "ab")
        merged[name] = weight + ALPHA / RANK * (b @ a)
    assert expert.probe is not None
    x = torch.from_numpy(bundle.floats(expert.probe.inputs))
    answers = (torch.nn.functional.silu(x @ merged["gate"].T) * (x @ up.T)) @ merged["down"].T
    assert np.allclose(bundle.floats(expert.probe.outputs), answers.numpy(), rtol=1e-4, atol=1e-4)


def test_the_scale_of_rslora_is_kept(tmp_path: Path, base: Path) -> None:
    done = packed(write_adapter(tmp_path / "adapter", use_rslora=True), base, tmp_path / "b")
    assert done.bundle.manifest.experts[0].parameters["alpha"] == pytest.approx(ALPHA * RANK**0.5)


def test_an_adapter_of_other_modules_is_told_and_refused(tmp_path: Path, base: Path) -> None:
    tensors = factors(f"{EXPERT}w1.", 32, 24, 0) | factors(ATTENTION, 32, 32, 1)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(InvalidArgument, match=r"self_attn\.q_proj: --experts-only"):
        pack(Order(adapter, base, tmp_path / "b"))
    done = packed(adapter, base, tmp_path / "b", experts_only=True)
    assert done.bundle.manifest.origin["left_out"] == "adapters of modules that are no experts: 1"


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (None, {"use_dora": True}, "use_dora is not supported"),
        (None, {"rank_pattern": {"w1": 4}}, "rank_pattern is not supported"),
        (None, {"r": 3}, "do not fit the base"),
        (None, {"r": "2"}, "must be numbers"),
        (factors(ATTENTION, 32, 32, 1), {}, "adapts no expert"),
        (factors(f"{EXPERT}w1.", 31, 24, 1), {}, "do not fit the base"),
        ({f"{EXPERT}w1.lora_A.weight": np.zeros((2, 32), "f4")}, {}, "one factor alone"),
        ({f"{EXPERT}w1.lora_magnitude_vector": np.zeros(2, "f4")}, {}, "no factor of plain LoRA"),
    ],
)
def test_what_is_not_plain_lora_of_the_base_is_refused(
    tmp_path: Path, base: Path, tensors: dict[str, np.ndarray] | None, config: dict[str, Any], words: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", tensors, **config)
    with pytest.raises(InvalidArgument, match=words) as refused:
        pack(Order(adapter, base, tmp_path / "b"))
    assert refused.value.field == "model"


def test_a_base_that_stacks_its_experts_is_refused(tmp_path: Path) -> None:
    fused = write_mixtral(tmp_path / "fused", layout="fused")
    with pytest.raises(InvalidArgument, match="each is by itself") as refused:
        pack(Order(write_adapter(tmp_path / "adapter"), fused, tmp_path / "b"))
    assert refused.value.field == "base"


def test_layers_and_slots_choose_here_too(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    with pytest.raises(InvalidArgument, match="that was chosen"):
        pack(Order(adapter, base, tmp_path / "b", wanted=Wanted(layers=frozenset({0}))))
