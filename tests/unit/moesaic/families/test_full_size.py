"""Published models in full size, as an index without files: every tensor that they have is described, none is missing,
and there are as many parameters as they are known to have.

What they have is told without our descriptions: by the modules of transformers on the meta device, under the names of
the published files, or by the reference notes where transformers has no modules.
"""

# Shapes: D hidden size, F inner size, E slots.

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support import published_configs as published
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.checkpoints.safetensors_file import TensorEntry
from moesaic.families import MoeModel, describe_model

# (name, dtype as the files call it, shape)
Stored = tuple[str, str, tuple[int, ...]]
Store = Callable[[str, tuple[int, ...]], Iterator[Stored]]

_ITEM_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}


def module_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Parameters and saved buffers of the modules of transformers."""
    values = {key: value for key, value in config.items() if key not in {"model_type", "quantization_config"}}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(values))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def store_plain(name: str, shape: tuple[int, ...]) -> Iterator[Stored]:
    yield name, "BF16", shape


def store_each(names: Mapping[str, str]) -> Store:
    """Experts one by one: `names` of gate, up and down in the files, in place of `mlp.experts.gate_up_proj`."""

    def store(name: str, shape: tuple[int, ...]) -> Iterator[Stored]:
        if not (found := re.fullmatch(r"(.*)\.mlp\.experts\.(gate_up|down)_proj", name)):
            yield name.replace(".mlp.gate.", names["router"]), "BF16", shape
            return
        prefix, part = found.groups()
        num_slots, rows, columns = shape
        for slot in range(num_slots):
            for weight in ("gate", "up") if part == "gate_up" else ("down",):
                stored = (rows // 2, columns) if part == "gate_up" else (rows, columns)
                yield prefix + names[weight].format(slot=slot), "BF16", stored

    return store


_QWEN_NAMES = {
    "router": ".mlp.gate.",
    **{weight: f".mlp.experts.{{slot}}.{weight}_proj.weight" for weight in ("gate", "up", "down")},
}
_MIXTRAL_NAMES = {
    "router": ".block_sparse_moe.gate.",
    "gate": ".block_sparse_moe.experts.{slot}.w1.weight",
    "up": ".block_sparse_moe.experts.{slot}.w3.weight",
    "down": ".block_sparse_moe.experts.{slot}.w2.weight",
}
store_qwen = store_each(_QWEN_NAMES)
store_mixtral = store_each(_MIXTRAL_NAMES)


def store_float8(name: str, shape: tuple[int, ...]) -> Iterator[Stored]:
    """DeepSeek-V3: projections in float8 with a factor for every 128 x 128 of them, the rest as it is."""
    for stored, _, sizes in store_qwen(name, shape):
        if re.search(r"\.layers\..*_(proj|mqa)\.weight$", stored):
            yield stored, "F8_E4M3", sizes
            yield f"{stored}_scale_inv", "F32", tuple(math.ceil(size / 128) for size in sizes)
        else:
            yield stored, "F32" if stored.endswith("correction_bias") else "BF16", sizes


def store_mxfp4(name: str, shape: tuple[int, ...]) -> Iterator[Stored]:
    """gpt-oss: experts with output rows, 32 inputs of a row in 16 bytes beside their power of two."""
    if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        yield name, "BF16", shape
        return
    num_slots, inputs, outputs = shape
    yield f"{name}_blocks", "U8", (num_slots, outputs, inputs // 32, 16)
    yield f"{name}_scales", "U8", (num_slots, outputs, inputs // 32)


def deepseek_predictor() -> Iterator[Stored]:
    """The layer after the last, which predicts one token more: a decoder layer with experts, and what joins it on."""
    prefix, hidden, vocab = "model.layers.61.", 7168, 129280
    yield prefix + "embed_tokens.weight", "BF16", (vocab, hidden)
    yield prefix + "shared_head.head.weight", "BF16", (vocab, hidden)
    yield prefix + "eh_proj.weight", "BF16", (hidden, 2 * hidden)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{prefix}{norm}.weight", "BF16", (hidden,)
    for name, shape in module_tensors(published.DEEPSEEK_V3).items():
        if name.startswith("model.layers.60."):
            yield from store_float8(name.replace(".60.", ".61."), shape)


def striped_hyena_tensors() -> Iterator[Stored]:
    """By the reference notes; parameters are bfloat16 except poles and residues."""
    hidden, inner, vocab, prefix = 4096, 14336, 32000, "backbone."
    yield prefix + "embedding_layer.weight", "BF16", (vocab, hidden)
    yield prefix + "norm.scale", "BF16", (hidden,)
    yield prefix + "unembed.weight", "BF16", (vocab, hidden)
    for block in range(32):
        name = f"{prefix}blocks.{block}."
        yield name + "pre_norm.scale", "BF16", (hidden,)
        yield name + "post_norm.scale", "BF16", (hidden,)
        yield name + "mlp.l1.weight", "BF16", (inner, hidden)
        yield name + "mlp.l2.weight", "BF16", (inner, hidden)
        yield name + "mlp.l3.weight", "BF16", (hidden, inner)
        if block % 2:
            yield name + "inner_mha_cls.Wqkv.weight", "BF16", (6144, hidden)
            yield name + "inner_mha_cls.out_proj.weight", "BF16", (hidden, hidden)
            yield name + "inner_mha_cls.rotary_emb.inv_freq", "BF16", (64,)
            continue
        yield name + "projections.weight", "BF16", (3 * hidden, hidden)
        yield name + "projections.bias", "BF16", (3 * hidden,)
        yield name + "out_filter_dense.weight", "BF16", (hidden, hidden)
        yield name + "out_filter_dense.bias", "BF16", (hidden,)
        yield name + "filter.short_filter_weight", "BF16", (3 * hidden, 1, 3)
        yield name + "filter.short_filter_bias", "BF16", (3 * hidden,)
        yield name + "filter.D", "BF16", (hidden,)
        yield name + "filter.poles", "F32", (hidden, 2, 1, 2)
        yield name + "filter.residues", "F32", (hidden, 2, 1, 2)


def phixtral_tensors(num_slots: int) -> Iterator[Stored]:
    """By the reference notes: the old layout of Phi, with several MLPs in a block."""
    hidden, inner, vocab = 2560, 10240, 51200

    def linear(name: str, rows: int, columns: int) -> Iterator[Stored]:
        yield name + ".weight", "BF16", (rows, columns)
        yield name + ".bias", "BF16", (rows,)

    def norm(name: str) -> Iterator[Stored]:
        yield name + ".weight", "BF16", (hidden,)
        yield name + ".bias", "BF16", (hidden,)

    yield "transformer.embd.wte.weight", "BF16", (vocab, hidden)
    yield from norm("lm_head.ln")
    yield from linear("lm_head.linear", vocab, hidden)
    for block in range(32):
        name = f"transformer.h.{block}."
        yield from norm(name + "ln")
        yield from linear(name + "mixer.Wqkv", 3 * hidden, hidden)
        yield from linear(name + "mixer.out_proj", hidden, hidden)
        yield name + "moe.gate.weight", "BF16", (num_slots, hidden)
        for slot in range(num_slots):
            yield from linear(f"{name}moe.mlp.{slot}.fc1", inner, hidden)
            yield from linear(f"{name}moe.mlp.{slot}.fc2", hidden, inner)


def describe(config: Mapping[str, Any], stored: Iterator[Stored]) -> MoeModel:
    """Raises CheckpointError where tensors and description differ by so much as a shape."""
    tensors = {name: _entry(name, dtype, shape) for name, dtype, shape in stored}
    return describe_model(Checkpoint(Path("published"), config, tensors))


def _entry(name: str, dtype: str, shape: tuple[int, ...]) -> TensorEntry:
    num_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    return TensorEntry(name, Path("model.safetensors"), dtype, shape, first_byte=0, num_bytes=num_bytes)


def describe_modules(
    config: Mapping[str, Any], store: Store, more: Iterable[Stored] = ()
) -> tuple[MoeModel, int]:
    """The model as described, and how many parameters the modules have."""
    modules = module_tensors(config)

    def stored() -> Iterator[Stored]:
        for name, shape in modules.items():
            yield from store(name, shape)
        yield from more

    return describe(config, stored()), sum(math.prod(shape) for shape in modules.values())


@pytest.mark.parametrize(
    ("config", "store", "num_parameters"),
    [
        pytest.param(published.MIXTRAL_8X7B, store_mixtral, 46_702_792_704, id="Mixtral-8x7B"),
        pytest.param(published.MISTRAL_7B, store_plain, 7_241_732_096, id="Mistral-7B"),
        pytest.param(published.BEYONDER_4X7B_V2, store_mixtral, 24_153_690_112, id="Beyonder-4x7B-v2"),
        pytest.param(published.PHI_2, store_plain, 2_779_683_840, id="phi-2"),
        pytest.param(published.QWEN3_30B_A3B, store_qwen, 30_532_122_624, id="Qwen3-30B-A3B"),
        pytest.param(published.OLMOE_1B_7B, store_qwen, 6_919_161_856, id="OLMoE-1B-7B"),
        pytest.param(published.GPT_OSS_20B, store_mxfp4, 20_914_757_184, id="gpt-oss-20b"),
        pytest.param(published.GPT_OSS_120B, store_mxfp4, 116_829_156_672, id="gpt-oss-120b"),
    ],
)
def test_a_published_model_is_described_to_the_last_tensor(
    config: Mapping[str, Any], store: Store, num_parameters: int
) -> None:
    model, in_modules = describe_modules(config, store)
    assert model.num_parameters == in_modules == num_parameters


def test_mixtral_is_described_alike_once_its_experts_are_joined() -> None:
    joined, _ = describe_modules(published.MIXTRAL_8X7B, store_plain)
    classic, _ = describe_modules(published.MIXTRAL_8X7B, store_mixtral)
    assert joined.num_parameters == classic.num_parameters
    assert classic.num_active_parameters == 12_879_925_248
    assert classic.expert_bytes(0) == 336 << 20


def test_deepseek_v3_is_described_in_float8_without_its_predicting_layer() -> None:
    model, in_modules = describe_modules(published.DEEPSEEK_V3, store_float8, deepseek_predictor())
    # The modules hold the selection bias of each gate as a buffer, which is counted here as well.
    assert model.num_parameters == in_modules == 671_026_419_200
    assert model.num_slots == dict.fromkeys(range(3, 61), 256)
    assert {pattern.encoding for pattern in model.experts[60].layout.values()} == {"fp8_block"}
    assert model.experts[60].dtype == "bfloat16"
    first = "model.layers.0.mlp.gate_proj.weight"
    assert model.dense[first].scales == f"{first}_scale_inv"
    assert all(name.startswith("model.layers.61.") for name in model.ignored)


def test_the_experts_of_gpt_oss_are_decoded_from_mxfp4() -> None:
    model, _ = describe_modules(published.GPT_OSS_20B, store_mxfp4)
    layout = model.experts[0].layout
    assert (layout["gate"].encoding, layout["gate_bias"].encoding) == ("mxfp4", "plain")
    assert model.experts[0].dtype == "bfloat16"


def test_striped_hyena_7b_is_described_to_the_last_tensor() -> None:
    model = describe(published.STRIPED_HYENA_7B, striped_hyena_tensors())
    assert model.num_parameters == 7_646_023_680


@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [(published.PHIXTRAL_2X, 4_457_978_880), (published.PHIXTRAL_4X, 7_814_405_120)],
    ids=["phixtral-2x2_8", "phixtral-4x2_8"],
)
def test_phixtral_is_described_to_the_last_tensor(config: Mapping[str, Any], num_parameters: int) -> None:
    model = describe(config, phixtral_tensors(config["num_local_experts"]))
    assert model.num_parameters == num_parameters
