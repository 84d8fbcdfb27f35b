"""Packing: what a fine-tune changed, in every layout, and what is refused because it changed more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import random_mixtral
from support.tiny_families import random_model, write_family
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cluster.bundles.model_folder import open_model
from cluster.bundles.order import Order, Packed
from cluster.bundles.pack import pack
from cluster.bundles.selection import Origin, Wanted
from expert_worker.experts.expert import ExpertForm
from expert_worker.experts.loader import load_experts
from moesaic.bundles import verify
from moesaic.epoch import ExpertAddress
from moesaic.errors import InvalidArgument

FORM = ExpertForm(torch.device("cpu"), torch.float32)
Change = Callable[[dict[str, torch.Tensor]], object]


def tuned(model: PreTrainedModel, change: Change) -> PreTrainedModel:
    """The model after a change of its tensors by name."""
    with torch.no_grad():
        change(dict(model.state_dict()))
    return model


def write(model: PreTrainedModel, folder: Path, *, fused: bool = False) -> Path:
    model.save_pretrained(folder, save_original_format=not fused)
    return folder


def packed(model: Path, base: Path, out: Path, **order: Any) -> Packed:
    """Packed, and verified against the base."""
    done = pack(Order(model, base, out, **order))
    verify(done.bundle, base=open_model(base, "base").as_base())
    return done


def worker_version(folder: Path, layer: int, slot: int) -> str:
    """What a worker that holds this folder calls the expert."""
    opened = open_model(folder, "model")
    loaded = dict(load_experts(opened.checkpoint, opened.model, [ExpertAddress(layer, slot)], FORM))
    return loaded[ExpertAddress(layer, slot)].version.hex()


def of_mixtral(name: str) -> str:
    return f"model.layers.1.mlp.{name}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(random_mixtral(), tmp_path_factory.mktemp("base") / "mixtral")


@pytest.mark.parametrize("fused", [False, True], ids=["classic", "fused"])
def test_only_what_differs_is_packed_whatever_the_layout(tmp_path: Path, base: Path, fused: bool) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[of_mixtral("experts.down_proj")][2] *= 1.01
        tensors["model.layers.0.mlp.experts.gate_up_proj"][0] += 0.01

    folder = write(tuned(random_mixtral(), change), tmp_path / "tuned", fused=fused)
    done = packed(folder, base, tmp_path / "legal-v2")
    assert [(one.layer, one.slot, one.target, one.has_row) for one in done.experts] == [
        (0, 0, 0, False),
        (1, 2, 2, False),
    ]
    assert (done.origin, done.compared, done.moved) == (Origin.SAME_SIZE, 8, ())
    assert done.experts[1].difference == pytest.approx(0.006, rel=0.3)
    for expert in done.bundle.manifest.experts:
        assert expert.slot is not None
        assert expert.version == worker_version(folder, expert.layer, expert.slot)
    assert done.bundle.manifest.name == "legal-v2"
    assert done.bundle.manifest.origin["layer 1"].startswith("slot 2 differs by 0.6")


def test_probe_answers_are_those_of_the_expert(tmp_path: Path, base: Path) -> None:
    folder = write(
        tuned(random_mixtral(), lambda t: t[of_mixtral("experts.down_proj")][2].mul_(2)), tmp_path / "t"
    )
    bundle = packed(folder, base, tmp_path / "b").bundle
    expert = bundle.manifest.experts[0]
    assert expert.probe is not None
    rows = bundle.floats(expert.probe.inputs)
    assert np.allclose((rows**2).mean(axis=1), 1, rtol=1e-5)
    gate, up, down = (torch.from_numpy(bundle.floats(expert.weights[n])) for n in ("gate", "up", "down"))
    x = torch.from_numpy(rows)
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert np.allclose(bundle.floats(expert.probe.outputs), expected.numpy(), atol=1e-5)


def test_a_gate_row_that_moved_goes_with_its_expert(tmp_path: Path, base: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[of_mixtral("experts.down_proj")][2] *= 1.01
        tensors[of_mixtral("gate.weight")][2] *= 1.25

    model = tuned(random_mixtral(), change)
    done = packed(write(model, tmp_path / "t"), base, tmp_path / "b")
    row = done.bundle.manifest.experts[0].gate_row
    assert row is not None
    assert done.experts[0].row_difference == pytest.approx(0.25)
    assert np.array_equal(
        done.bundle.floats(row.tensor), model.state_dict()[of_mixtral("gate.weight")][2].numpy()
    )


@pytest.mark.parametrize(
    ("tensor", "group"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "attention: 1 of 8 differ by up to 10 %"),
        ("model.embed_tokens.weight", "embeddings: 1 of 1"),
        ("model.norm.weight", "norms: 1 of 5"),
        ("lm_head.weight", "output head: 1 of 1"),
    ],
)
def test_a_fine_tune_that_moved_more_is_told_with_figures_and_refused(
    tmp_path: Path, base: Path, tensor: str, group: str
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[of_mixtral("experts.down_proj")][2] *= 1.01
        tensors[tensor] *= 1.1

    folder = write(tuned(random_mixtral(), change), tmp_path / "t")
    with pytest.raises(InvalidArgument, match="--experts-only") as refused:
        pack(Order(folder, base, tmp_path / "b"))
    assert group in refused.value.message
    assert not (tmp_path / "b").exists()
    done = packed(folder, base, tmp_path / "b", experts_only=True)
    assert group in done.bundle.manifest.origin["left_out"]
    assert [(one.layer, one.slot) for one in done.experts] == [(1, 2)]


def test_a_slot_whose_gate_row_alone_moved_is_packed_so_that_the_model_is_the_fine_tune(
    tmp_path: Path, base: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[of_mixtral("gate.weight")][3] *= 1.1

    folder = write(tuned(random_mixtral(), change), tmp_path / "t")
    done = packed(folder, base, tmp_path / "b")
    assert [(one.layer, one.target, one.difference, one.has_row) for one in done.experts] == [
        (1, 3, 0.0, True)
    ]
    assert done.bundle.manifest.experts[0].version == worker_version(base, 1, 3)


def test_gate_rows_that_are_not_packed_are_told(tmp_path: Path, base: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[of_mixtral("experts.down_proj")][2] *= 1.01
        tensors[of_mixtral("gate.weight")][:3] *= 1.1

    folder = write(tuned(random_mixtral(), change), tmp_path / "t")
    with pytest.raises(InvalidArgument, match="other gate rows: 2 of 7 differ by up to 10 %"):
        pack(Order(folder, base, tmp_path / "b", wanted=Wanted(slots=frozenset({2}))))


def test_layers_and_slots_choose(tmp_path: Path, base: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            tensors[f"model.layers.{layer}.mlp.experts.down_proj"] *= 1.1

    folder = write(tuned(random_mixtral(), change), tmp_path / "t")
    wanted = Wanted(layers=frozenset({1}), slots=frozenset({0, 3}))
    done = packed(folder, base, tmp_path / "b", wanted=wanted)
    assert [(one.layer, one.slot) for one in done.experts] == [(1, 0), (1, 3)]


def test_the_base_itself_holds_nothing_to_pack(tmp_path: Path, base: Path) -> None:
    with pytest.raises(InvalidArgument, match="nothing to pack"):
        pack(Order(base, base, tmp_path / "b"))


def test_another_dtype_alone_is_no_difference(tmp_path: Path) -> None:
    half = write(random_mixtral().bfloat16(), tmp_path / "half")
    same = write(AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32), tmp_path / "same")
    with pytest.raises(InvalidArgument, match="nothing to pack"):
        pack(Order(same, half, tmp_path / "b"))


def grown(base: PreTrainedModel, larger: PreTrainedModel, first: int) -> PreTrainedModel:
    """`larger` with the base's tensors, and the base's first experts and gate rows."""
    own = base.state_dict()
    with torch.no_grad():
        for name, tensor in larger.state_dict().items():
            if tensor.shape == own[name].shape:
                tensor.copy_(own[name])
            else:
                tensor[:first].copy_(own[name][:first])
    return larger


def test_further_slots_are_packed_as_new_ones_with_their_rows(tmp_path: Path, base: Path) -> None:
    model = grown(random_mixtral(), random_mixtral(seed=3, num_local_experts=5), 4)
    folder = write(model, tmp_path / "t")
    done = packed(folder, base, tmp_path / "b")
    assert done.origin is Origin.MORE_SLOTS
    assert [(one.layer, one.slot, one.target, one.has_row) for one in done.experts] == [
        (0, 4, None, True),
        (1, 4, None, True),
    ]
    expert = done.bundle.manifest.experts[1]
    assert expert.version == worker_version(folder, 1, 4)
    assert expert.gate_row is not None
    rows = model.state_dict()[of_mixtral("gate.weight")]
    assert np.array_equal(done.bundle.floats(expert.gate_row.tensor), rows[4].numpy())


def test_a_second_version_of_an_added_slot_is_packed_to_replace_it(tmp_path: Path, base: Path) -> None:
    folder = write(grown(random_mixtral(), random_mixtral(seed=3, num_local_experts=5), 4), tmp_path / "t")
    done = packed(folder, base, tmp_path / "b", wanted=Wanted(slots=frozenset({4}), into="same"))
    assert {one.slot for one in done.bundle.manifest.experts} == {4}
    assert all(one.gate_row is not None for one in done.bundle.manifest.experts)


def test_further_slots_beside_experts_that_were_trained_too_are_refused(tmp_path: Path, base: Path) -> None:
    model = grown(random_mixtral(), random_mixtral(seed=3, num_local_experts=5), 4)
    folder = write(tuned(model, lambda t: t[of_mixtral("experts.down_proj")][1].mul_(1.5)), tmp_path / "t")
    with pytest.raises(InvalidArgument, match="other experts: 1 of 8"):
        pack(Order(folder, base, tmp_path / "b"))


def flex_olmo(folder: Path, change: Change = lambda tensors: None) -> Path:
    pair = grown(random_model("flex_olmo"), random_model("flex_olmo", seed=5, num_experts=2), 1)
    return write_family(folder, tuned(pair, change))


def test_a_pair_of_flex_olmo_gives_its_own_expert(tmp_path: Path) -> None:
    public = write_family(tmp_path / "base", random_model("flex_olmo"))
    folder = flex_olmo(tmp_path / "pair")
    done = packed(folder, public, tmp_path / "b")
    assert done.origin is Origin.PUBLIC_AND_OWN
    assert [(one.layer, one.slot, one.target, one.has_row) for one in done.experts] == [
        (layer, 1, None, True) for layer in range(3)
    ]
    assert done.bundle.manifest.experts[2].version == worker_version(folder, 2, 1)


@pytest.mark.parametrize(
    ("tensor", "group"),
    [
        ("model.layers.1.mlp.experts.down_proj", "other experts: 1 of 3"),
        ("model.layers.1.mlp.gate.weight", "other gate rows: 1 of 3"),
        ("model.layers.1.self_attn.o_proj.weight", "attention: 1 of"),
    ],
)
def test_a_pair_whose_public_half_moved_is_not_admitted(tmp_path: Path, tensor: str, group: str) -> None:
    public = write_family(tmp_path / "base", random_model("flex_olmo"))
    folder = flex_olmo(tmp_path / "pair", lambda tensors: tensors[tensor][0].add_(1))
    with pytest.raises(InvalidArgument, match=group):
        pack(Order(folder, public, tmp_path / "b"))


@pytest.mark.parametrize("joined", [False, True], ids=["each", "joined"])
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3"])
def test_other_families_are_packed_alike(tmp_path: Path, family: str, joined: bool) -> None:
    public = write_family(tmp_path / "base", random_model(family))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.startswith("model.layers.2.") and "experts.down_proj" in name and tensor.dim() == 3:
                tensor[1] *= 1.5

    folder = write_family(tmp_path / "t", tuned(random_model(family), change), joined=joined)
    done = packed(folder, public, tmp_path / "b")
    assert [(one.layer, one.slot, one.target) for one in done.experts] == [(2, 1, 1)]
    assert done.bundle.manifest.experts[0].version == worker_version(folder, 2, 1)


def test_a_gate_of_groups_takes_no_new_slots(tmp_path: Path) -> None:
    public = write_family(tmp_path / "base", random_model("deepseek_v3"))
    folder = write_family(tmp_path / "t", random_model("deepseek_v3", seed=1))
    with pytest.raises(InvalidArgument, match="groups of slots") as refused:
        pack(Order(folder, public, tmp_path / "b", wanted=Wanted(into="new")))
    assert refused.value.field == "base"


def test_the_mlps_of_a_dense_model_become_new_experts_without_rows(tmp_path: Path, base: Path) -> None:
    config = AutoConfig.for_model("mistral", **_sizes_of(base))
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folder = write(dense, tmp_path / "dense")
    with pytest.raises(InvalidArgument, match="moved more"):
        pack(Order(folder, base, tmp_path / "b"))
    done = packed(folder, base, tmp_path / "b", experts_only=True)
    assert done.origin is Origin.DENSE
    assert [(one.layer, one.target, one.has_row) for one in done.experts] == [
        (0, None, False),
        (1, None, False),
    ]


def _sizes_of(base: Path) -> dict[str, Any]:
    config = open_model(base, "base").checkpoint.config
    keys = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings"),
    )
    return {key: config[key] for key in keys}


def test_experts_of_another_shape_are_refused(tmp_path: Path, base: Path) -> None:
    folder = write(random_mixtral(intermediate_size=40), tmp_path / "t")
    with pytest.raises(InvalidArgument, match="another shape"):
        pack(Order(folder, base, tmp_path / "b"))


@pytest.mark.parametrize(
    ("order", "field"),
    [({"name": "Legal v2"}, "name"), ({"tags": ("a:b",)}, "tag"), ({"out": Path("/")}, "out")],
)
def test_bad_names_are_told_before_anything_is_read(base: Path, order: dict[str, Any], field: str) -> None:
    given = {"tuned": Path("/nowhere"), "base": base, "out": Path("/tmp/never"), "name": "x"} | order
    with pytest.raises(InvalidArgument) as refused:
        pack(Order(**given))
    assert refused.value.field == field


def test_a_folder_that_is_no_model_names_the_option(tmp_path: Path, base: Path) -> None:
    for folders, field in (((tmp_path / "no", base), "model"), ((base, tmp_path / "no"), "base")):
        with pytest.raises(InvalidArgument, match="no such folder") as refused:
            pack(Order(*folders, tmp_path / "b"))
        assert refused.value.field == field


@pytest.mark.shared
@pytest.mark.parametrize("layout", ["hf_v5_fused", "mistral_native"])
def test_the_same_model_in_another_layout_holds_nothing_to_pack(
    tmp_path: Path, shared: Path, layout: str
) -> None:
    mixtral = shared / "goldens" / "mixtral"
    with pytest.raises(InvalidArgument, match="nothing to pack"):
        pack(Order(mixtral / layout, mixtral / "hf_v4", tmp_path / "b"))


@pytest.mark.shared
def test_a_model_of_which_mergekit_made_an_expert_is_that_expert(tmp_path: Path, shared: Path) -> None:
    merged = shared / "goldens" / "mergekit-moe"
    order = {"experts_only": True, "wanted": Wanted(layers=frozenset({1}))}
    done = packed(merged / "models" / "expert2", merged / "output_hidden", tmp_path / "b", **order)
    (expert,) = done.bundle.manifest.experts
    assert expert.version == worker_version(merged / "output_hidden", 1, 2)
