"""Every kind of expert that a bundle may have becomes the function that it says; what does not fit is refused by name."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.expert_calls import ReferenceExperts
from support.third_party_kind import installed
from torch import Tensor

from expert_worker.experts.expert import Expert, ExpertForm, compute_experts, row_dtype
from expert_worker.experts.load_plan import LoadJob, plan_load
from expert_worker.experts.loader import ExpertLoader, load_experts
from expert_worker.experts.stack import Place
from moesaic.bundles import Bundle, BundleExpert, Manifest, TensorSource, write_bundle
from moesaic.bundles.version import mlp_parameters
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.compute.linear import WeightForm
from moesaic.epoch import ExpertAddress, ExpertVersion
from moesaic.errors import FailedPrecondition, InvalidArgument
from moesaic.families import MoeModel
from moesaic.families.model import ExpertModule

HIDDEN = 32
CPU = torch.device("cpu")
FLOAT32 = ExpertForm(CPU, torch.float32)
ROWS = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
# Its default rule, and that of gpt-oss.
MODULES = [
    ExpertModule(HIDDEN, 24, "silu"),
    ExpertModule(HIDDEN, 40, "silu"),
    ExpertModule(HIDDEN, 24, "relu", gated=False),
    ExpertModule(HIDDEN, 24, "gelu_new", gated=False, biased=True),
    ExpertModule(HIDDEN, 16, "clamped_swiglu", biased=True, limit=7.0),
]


def source(tensor: Tensor) -> TensorSource:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8"}
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return TensorSource(names[tensor.dtype], tuple(tensor.shape), lambda: iter((data,)))


def bundle_of(
    folder: Path, kind: str, parameters: Mapping[str, Any], weights: Mapping[str, Tensor], layer: int = 1
) -> Bundle:
    expert = BundleExpert(layer, None, kind, parameters, "", {name: f"w.{name}" for name in weights})
    draft = Manifest("b", "base", "0" * 64, HIDDEN, (expert,), {})
    return write_bundle(folder, draft, {f"w.{name}": source(weight) for name, weight in weights.items()})


def plan(bundle: Bundle, folder: Path, model: MoeModel, form: ExpertForm = FLOAT32) -> LoadJob:
    (expert,) = bundle.manifest.experts
    version = ExpertVersion(ExpertAddress(expert.layer, 4), bytes.fromhex(expert.version))
    (job,) = plan_load([version], bundle, ExpertLoader(open_checkpoint(folder), model, form))
    return job


def build(bundle: Bundle, folder: Path, model: MoeModel, form: ExpertForm = FLOAT32) -> Expert:
    return plan(bundle, folder, model, form).build(Place(), threading.Event())


def random_weights(module: ExpertModule, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(module.shape(name), generator=generator) / module.shape(name)[-1] ** 0.5
        for name in module.weights
    }


def formula(module: ExpertModule, weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """What an MLP computes, as it is written."""
    activations = {"silu": F.silu, "relu": F.relu, "gelu_new": lambda x: F.gelu(x, approximate="tanh")}

    def project(name: str, x: Tensor) -> Tensor:
        bias = weights[f"{name}_bias"].float() if module.biased else None
        return F.linear(x, weights[name].float(), bias)

    up = project("up", rows)
    if module.limit is not None:
        gate = project("gate", rows).clamp(max=module.limit)
        inner = gate * torch.sigmoid(1.702 * gate) * (up.clamp(-module.limit, module.limit) + 1)
    elif module.gated:
        inner = activations[module.activation](project("gate", rows)) * up
    else:
        inner = activations[module.activation](up)
    return project("down", inner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("module", MODULES)
def test_an_mlp_of_any_form_computes_its_formula(
    tmp_path: Path, folder: Path, model: MoeModel, module: ExpertModule, dtype: torch.dtype
) -> None:
    weights = {name: weight.to(dtype) for name, weight in random_weights(module).items()}
    bundle = bundle_of(tmp_path / "b", "mlp", mlp_parameters(module), weights)
    job = plan(bundle, folder, model)
    assert job.module == module and job.stored_bytes == module.num_parameters * dtype.itemsize
    expert = job.build(Place(), threading.Event())
    assert expert.num_bytes <= job.held_bytes
    torch.testing.assert_close(expert(ROWS), formula(module, weights, ROWS), atol=1e-5, rtol=1e-5)


def test_the_same_weights_have_the_same_version_in_a_bundle_and_in_a_model_folder(
    tmp_path: Path, folder: Path, model: MoeModel
) -> None:
    reference, address = ReferenceExperts(folder), ExpertAddress(1, 2)
    weights = {name: reference.weight(1, 2, name) for name in ("gate", "up", "down")}
    bundle = bundle_of(tmp_path / "b", "mlp", mlp_parameters(model.experts[1].module), weights)
    ((_, held),) = load_experts(open_checkpoint(folder), model, [address], FLOAT32)
    assert bundle.manifest.experts[0].version == held.version.hex()
    assert torch.equal(build(bundle, folder, model)(ROWS), held.expert(ROWS))


def lora(
    folder: Path, model: MoeModel, names: tuple[str, ...] = ("gate", "down"), **changes: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Parameters and factors on slot 2 of layer 1."""
    module = model.experts[1].module
    ((_, held),) = load_experts(open_checkpoint(folder), model, [ExpertAddress(1, 2)], FLOAT32)
    generator = torch.Generator().manual_seed(3)
    factors = {}
    for name in names:
        outputs, inputs = module.shape(name)
        factors[f"{name}_a"] = torch.randn(4, inputs, generator=generator) / 4
        factors[f"{name}_b"] = torch.randn(outputs, 4, generator=generator) / 4
    return {"base_slot": 2, "base_version": held.version.hex(), "rank": 4, "alpha": 8.0} | changes, factors


@pytest.mark.parametrize("names", [("gate", "down"), ("up",), ()])
def test_low_rank_factors_make_a_new_expert_of_an_old_one(
    tmp_path: Path, folder: Path, model: MoeModel, names: tuple[str, ...]
) -> None:
    parameters, factors = lora(folder, model, names)
    reference, module = ReferenceExperts(folder), model.experts[1].module
    weights = {name: reference.weight(1, 2, name).clone() for name in ("gate", "up", "down")}
    for name in names:
        weights[name] += 2.0 * factors[f"{name}_b"] @ factors[f"{name}_a"]
    factors = factors or {}
    bundle_weights = factors or {"up_a": torch.zeros(4, HIDDEN), "up_b": torch.zeros(24, 4)}
    expert = build(bundle_of(tmp_path / "b", "lora", parameters, bundle_weights), folder, model)
    torch.testing.assert_close(expert(ROWS), formula(module, weights, ROWS), atol=1e-5, rtol=1e-5)


def test_low_rank_factors_on_another_base_are_refused(tmp_path: Path, folder: Path, model: MoeModel) -> None:
    parameters, factors = lora(folder, model, base_version="ab" * 32)
    with pytest.raises(FailedPrecondition) as caught:
        build(bundle_of(tmp_path / "b", "lora", parameters, factors), folder, model)
    assert caught.value.reason == "WRONG_VERSION"
    parameters, factors = lora(folder, model, base_slot=9)
    with pytest.raises(FailedPrecondition, match="no slot 9"):
        build(bundle_of(tmp_path / "c", "lora", parameters, factors), folder, model)


def quantised(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if weight.dim() == 1:
            stored[name] = weight
            continue
        scales = weight.abs().amax(1) / 100  # the largest number is 100, not 127: it must not be scaled anew
        stored |= {name: (weight / scales[:, None]).round().to(torch.int8), f"{name}_scales": scales}
    return stored


def widened(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: stored[name] * stored[f"{name}_scales"][:, None] if f"{name}_scales" in stored else stored[name]
        for name in stored
        if not name.endswith("_scales")
    }


@pytest.mark.parametrize("weights", ["float", "int8"])
@pytest.mark.parametrize("module", MODULES)
def test_8_bit_weights_are_held_as_they_are_stored(
    tmp_path: Path, folder: Path, model: MoeModel, module: ExpertModule, weights: WeightForm
) -> None:
    stored = quantised(random_weights(module))
    job = plan(
        bundle_of(tmp_path / "b", "int8", mlp_parameters(module), stored),
        folder,
        model,
        ExpertForm(CPU, torch.float32, weights),
    )
    expert = job.build(Place(), threading.Event())
    assert job.module is None and expert.num_bytes <= job.held_bytes < 2 * job.stored_bytes
    expected = formula(module, widened(stored), ROWS)
    # Rows are rounded to 8 bits, weights are not rounded again.
    assert (expert(ROWS) - expected).norm() / expected.norm() < 0.03


def test_experts_of_several_dtypes_share_a_pass_bit_by_bit(
    tmp_path: Path, folder: Path, model: MoeModel
) -> None:
    form = ExpertForm(CPU, torch.bfloat16)
    module = MODULES[0]
    eight = build(
        bundle_of(tmp_path / "a", "int8", mlp_parameters(module), quantised(random_weights(module))),
        folder,
        model,
        form,
    )
    plain = build(
        bundle_of(tmp_path / "b", "mlp", mlp_parameters(module), random_weights(module)), folder, model, form
    )
    assert (eight.dtype, plain.dtype) == (torch.float32, torch.bfloat16)
    assert row_dtype([plain, eight]) == torch.float32 and row_dtype([plain]) == torch.bfloat16
    rows = ROWS.bfloat16()
    together = compute_experts([plain, eight], torch.cat([rows, rows]).float(), [5, 5]).split(5)
    assert torch.equal(together[0], plain(rows).float())
    assert torch.equal(together[1], eight(rows))


def test_a_kind_of_another_package_is_found_by_its_name(
    tmp_path: Path, folder: Path, model: MoeModel
) -> None:
    scale = torch.arange(HIDDEN).float()
    bundle = bundle_of(tmp_path / "b", "scale", {"times": 3}, {"scale": scale})
    with pytest.raises(InvalidArgument) as caught:
        plan(bundle, folder, model)
    assert caught.value.reason == "BUNDLE_KIND"
    assert "int8, lora, mlp" in caught.value.message
    with installed(tmp_path / "site"):
        job = plan(bundle, folder, model)
        torch.testing.assert_close(job.build(Place(), threading.Event())(ROWS), ROWS * scale * 3)
        assert (job.module, job.held_bytes) == (None, 128)
        unknown = bundle_of(tmp_path / "c", "scaled", {}, {"scale": scale})
        with pytest.raises(InvalidArgument, match="int8, lora, mlp, scale"):
            plan(unknown, folder, model)


SMALL = ExpertModule(HIDDEN, 24, "silu")


@pytest.mark.parametrize(
    ("kind", "parameters", "problem"),
    [
        ("mlp", {"activation": "sillyu"}, "activation: must be one of"),
        ("mlp", {"inner_size": 23}, "gate: must have shape [23, 32]"),
        ("mlp", {"gated": False}, "weights: must be up, down"),
        ("mlp", {"biased": True}, "weights: must be gate, up, down, gate_bias"),
        ("mlp", {"code": "import os"}, "has no parameter code"),
        ("int8", {}, "weights: must be gate, gate_scales"),
        ("lora", {}, "has no parameter activation"),
        ("pickle", {}, "no such kind of expert is installed"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, folder: Path, model: MoeModel, kind: str, parameters: dict[str, Any], problem: str
) -> None:
    good = bundle_of(tmp_path / "b", "mlp", mlp_parameters(SMALL), random_weights(SMALL))
    (expert,) = good.manifest.experts
    changed = replace(expert, kind=kind, parameters={**expert.parameters, **parameters})
    bundle = replace(good, manifest=replace(good.manifest, experts=(changed,)))
    with pytest.raises(InvalidArgument) as caught:
        plan(bundle, folder, model)
    assert problem in caught.value.message and caught.value.field == "bundle"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rank": 0}, "rank: must be"),
        ({"rank": 25}, "rank: must be"),
        ({"base_slot": -1}, "base_slot: must be"),
        ({"base_version": "short"}, "base_version: must be"),
        ({"alpha": True}, "alpha: must be"),
        ({"other": 1}, "has no parameter other"),
    ],
)
def test_parameters_of_low_rank_factors_are_checked(
    tmp_path: Path, folder: Path, model: MoeModel, changes: dict[str, Any], problem: str
) -> None:
    parameters, factors = lora(folder, model, **changes)
    with pytest.raises(InvalidArgument) as caught:
        plan(bundle_of(tmp_path / "b", "lora", parameters, factors), folder, model)
    assert problem in caught.value.message


def test_a_version_that_is_not_that_of_the_weights_is_refused(
    tmp_path: Path, folder: Path, model: MoeModel
) -> None:
    good = bundle_of(tmp_path / "b", "mlp", mlp_parameters(SMALL), random_weights(SMALL))
    (expert,) = good.manifest.experts
    claimed = replace(good.manifest, experts=(replace(expert, version="ab" * 32),))
    with pytest.raises(InvalidArgument) as caught:
        plan(replace(good, manifest=claimed), folder, model)
    assert caught.value.reason == "BUNDLE_VERSION"


def test_a_layer_or_width_that_the_model_does_not_have_is_refused(
    tmp_path: Path, folder: Path, model: MoeModel
) -> None:
    good = bundle_of(tmp_path / "b", "mlp", mlp_parameters(SMALL), random_weights(SMALL), layer=7)
    with pytest.raises(InvalidArgument, match="layer 7"):
        plan(good, folder, model)
    wide = replace(good, manifest=replace(good.manifest, hidden_size=64))
    with pytest.raises(InvalidArgument, match="hidden_size: must be 32"):
        plan(wide, folder, model)
