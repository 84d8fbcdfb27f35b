"""Every way in which a checkpoint may keep an expert's weights gives the same expert, bit for bit, whatever is read for it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from expert_worker.experts.expert import ExpertForm
from expert_worker.experts.loader import load_experts
from expert_worker.experts.store import HeldExpert
from expert_worker.experts.stored_weight import stored_bytes
from moesaic.checkpoints.checkpoint import CONFIG_FILE, SINGLE_FILE, Checkpoint, open_checkpoint
from moesaic.compute.linear import Linear
from moesaic.epoch import ExpertAddress
from moesaic.errors import CheckpointError
from moesaic.families.model import (
    Encoding,
    ExpertLayer,
    ExpertModule,
    Layout,
    MoeModel,
    WeightPattern,
)

# No multiple of a block, and a multiple of a group.
HIDDEN, INNER, SLOTS = 160, 96, 3
GATED = ExpertModule(HIDDEN, INNER, "silu")
BIASED = ExpertModule(HIDDEN, INNER, "gelu", biased=True)
PLAIN = ExpertModule(HIDDEN, INNER, "gelu_new", gated=False, biased=True)
CPU = torch.device("cpu")
Weights = Mapping[str, Tensor]  # [E, O, I] or [E, O], by name


def random_weights(module: ExpertModule, dtype: torch.dtype = torch.float32, seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(SLOTS, *module.shape(name), generator=generator).to(dtype)
        for name in module.weights
    }


def write(folder: Path, tensors: Mapping[str, Tensor]) -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    # What lies before and after an expert's tensors must not matter.
    others = {"a.first": torch.full((5,), float("nan")), "z.last": torch.full((7, 3), float("inf"))}
    stored = {name: tensor.contiguous() for name, tensor in (others | dict(tensors)).items()}
    save_file(stored, folder / SINGLE_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps({"model_type": "none"}))
    return open_checkpoint(folder)


def describe(module: ExpertModule, layout: Layout, dtype: str = "float32") -> MoeModel:
    """A model of one layer, the second, that has experts."""
    layer = ExpertLayer(SLOTS, module, layout, dtype, gate=None)
    return MoeModel("test", 2, HIDDEN, 8, 16, dtype, mixers=(), experts={1: layer}, dense={})


def load(
    checkpoint: Checkpoint, model: MoeModel, dtype: torch.dtype = torch.float32
) -> dict[int, HeldExpert]:
    loaded = load_experts(checkpoint, model, model.addresses, ExpertForm(CPU, dtype))
    return {address.slot: held for address, held in loaded}


def matrix(linear: Linear) -> tuple[Tensor, Tensor]:
    """The weight and the bias that it computes with."""
    bias = linear(torch.zeros(1, linear.in_features))
    return (linear(torch.eye(linear.in_features)) - bias).T, bias[0]


def assert_holds(held: Mapping[int, HeldExpert], module: ExpertModule, expected: Weights) -> None:
    names = ("gate", "up") if module.gated else ("up",)
    for slot, one in held.items():
        up, up_bias = matrix(one.expert.up)
        down, down_bias = matrix(one.expert.down)
        if not module.biased:
            assert torch.equal(up, torch.cat([expected[name][slot] for name in names]))
            assert torch.equal(down, expected["down"][slot])
            continue
        # Adding and taking off a bias again costs the last bits.
        torch.testing.assert_close(up, torch.cat([expected[name][slot] for name in names]))
        torch.testing.assert_close(down, expected["down"][slot])
        assert torch.equal(up_bias, torch.cat([expected[f"{name}_bias"][slot] for name in names]))
        assert torch.equal(down_bias, expected["down_bias"][slot])


def separate(weights: Weights) -> tuple[dict[str, Tensor], Layout]:
    tensors = {
        f"1.experts.{slot}.{name}": of_slot
        for name, weight in weights.items()
        for slot, of_slot in enumerate(weight)
    }
    return tensors, {name: WeightPattern("{layer}.experts.{slot}." + name) for name in weights}


def stacked(weights: Weights) -> tuple[dict[str, Tensor], Layout]:
    tensors = {f"1.{name}": weight for name, weight in weights.items()}
    return tensors, {name: WeightPattern("{layer}." + name, stacked=True) for name in weights}


def joined(weights: Weights, *, interleaved: bool, transposed: bool) -> tuple[dict[str, Tensor], Layout]:
    """Gate and up in one tensor: halves of its rows, or row by row, as they are or as columns."""
    tensors, layout = {}, dict[str, WeightPattern]()
    for suffix in ("", "_bias"):
        if f"up{suffix}" not in weights:
            continue
        pair = [weights[f"gate{suffix}"], weights[f"up{suffix}"]]
        both = torch.stack(pair, 2).flatten(1, 2) if interleaved else torch.cat(pair, 1)
        down = weights[f"down{suffix}"]
        turn = transposed and not suffix
        tensors |= {
            f"1.gate_up{suffix}": both.mT if turn else both,
            f"1.down{suffix}": down.mT if turn else down,
        }
        for part, name in enumerate(("gate", "up")):
            layout[name + suffix] = WeightPattern(
                "{layer}.gate_up" + suffix, True, (part, 2), interleaved, transposed
            )
        layout["down" + suffix] = WeightPattern("{layer}.down" + suffix, True, transposed=transposed)
    return tensors, layout


LAYOUTS = {
    "a tensor each": separate,
    "stacked": stacked,
    "halves": lambda weights: joined(weights, interleaved=False, transposed=False),
    "interleaved": lambda weights: joined(weights, interleaved=True, transposed=False),
    "transposed halves": lambda weights: joined(weights, interleaved=False, transposed=True),
    "transposed and interleaved": lambda weights: joined(weights, interleaved=True, transposed=True),
}


@pytest.mark.parametrize("module", [GATED, BIASED], ids=["bare", "biased"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_weights_and_the_same_versions(
    tmp_path: Path, module: ExpertModule, layout: object
) -> None:
    weights = random_weights(module)
    versions = []
    for folder, arrange in (("one", separate), ("other", layout)):
        tensors, patterns = arrange(weights)  # type: ignore[operator]
        held = load(write(tmp_path / folder, tensors), describe(module, patterns))
        assert_holds(held, module, weights)
        versions.append([one.version for one in held.values()])
    assert versions[0] == versions[1]
    assert len(set(versions[0])) == SLOTS


@pytest.mark.parametrize("arrange", [separate, stacked])
def test_an_expert_without_a_gate_is_read_likewise(tmp_path: Path, arrange: object) -> None:
    weights = random_weights(PLAIN)
    tensors, patterns = arrange(weights)  # type: ignore[operator]
    assert_holds(load(write(tmp_path, tensors), describe(PLAIN, patterns)), PLAIN, weights)


def test_the_kind_of_an_expert_is_part_of_its_version(tmp_path: Path) -> None:
    tensors, patterns = separate(random_weights(BIASED))
    checkpoint = write(tmp_path, tensors)
    modules = (
        BIASED,
        dataclasses.replace(BIASED, activation="silu"),
        dataclasses.replace(BIASED, activation="clamped_swiglu", limit=7.0),
        dataclasses.replace(BIASED, activation="clamped_swiglu", limit=6.0),
        dataclasses.replace(BIASED, biased=False),
    )
    assert len({load(checkpoint, describe(module, patterns))[0].version for module in modules}) == 5


def encode_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[..., O, I] in blocks of 128 x 128, and the factor of each: what is decoded need not be what was encoded."""
    rows, columns = weight.shape[-2:]
    scales = torch.rand(*weight.shape[:-2], -(-rows // 128), -(-columns // 128)) + 0.5
    return (3 * weight).to(torch.float8_e4m3fn), scales


def encode_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Every code and many exponents."""
    generator = torch.Generator().manual_seed(weight.numel())
    groups = (*weight.shape[:-1], weight.shape[-1] // 32)
    blocks = torch.randint(0, 256, (*groups, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(60, 135, groups, generator=generator, dtype=torch.uint8)
    return blocks, scales


def decode_fp8(values: Tensor, scales: Tensor) -> Tensor:
    return _dequantize_fp8_weight(values, scales, [128, 128], torch.float32)


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    decoded = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)
    return decoded[0].T


ENCODINGS = {"fp8_block": (encode_fp8, decode_fp8), "mxfp4": (encode_mxfp4, decode_mxfp4)}
encodings = pytest.mark.parametrize("encoding", list(ENCODINGS))


def encoded(
    weights: Weights, encoding: Encoding, arrange: object
) -> tuple[dict[str, Tensor], Layout, dict[str, Tensor]]:
    """The tensors and patterns of a layout whose matrices are encoded, and what each of its tensors decodes to."""
    encode, decode = ENCODINGS[encoding]
    tensors, layout = arrange(weights)  # type: ignore[operator]
    decoded: dict[str, Tensor] = {}
    for name in [name for name in tensors if "bias" not in name]:
        values, scales = encode(tensors.pop(name))
        tensors |= {name: values, f"{name}.scales": scales}
        decoded[name] = (
            decode(values, scales)
            if values.dim() == (2 if encoding == "fp8_block" else 3)
            else torch.stack([decode(*of_slot) for of_slot in zip(values, scales, strict=True)])
        )
    patterns = {
        weight: pattern
        if "bias" in weight
        else dataclasses.replace(pattern, encoding=encoding, scales=pattern.tensor + ".scales")
        for weight, pattern in layout.items()
    }
    return tensors, patterns, decoded


@encodings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoded_weights_of_separate_tensors_are_decoded(
    tmp_path: Path, encoding: Encoding, dtype: torch.dtype
) -> None:
    tensors, patterns, decoded = encoded(random_weights(GATED), encoding, separate)
    held = load(write(tmp_path, tensors), describe(GATED, patterns), dtype)
    expected = {
        name: torch.stack([decoded[f"1.experts.{slot}.{name}"] for slot in range(SLOTS)]).to(dtype)
        for name in GATED.weights
    }
    assert_holds(held, GATED, {name: weight.float() for name, weight in expected.items()})


@encodings
@pytest.mark.parametrize("interleaved", [False, True])
def test_encoded_weights_of_joined_tensors_are_decoded(
    tmp_path: Path, encoding: Encoding, interleaved: bool
) -> None:
    """Of float8 the second half begins in the middle of a block."""
    tensors, patterns, decoded = encoded(
        random_weights(GATED),
        encoding,
        lambda weights: joined(weights, interleaved=interleaved, transposed=False),
    )
    both = decoded["1.gate_up"]
    gate, up = (both[:, 0::2], both[:, 1::2]) if interleaved else both.chunk(2, 1)
    held = load(write(tmp_path, tensors), describe(GATED, patterns))
    assert_holds(held, GATED, {"gate": gate, "up": up, "down": decoded["1.down"]})


@pytest.mark.parametrize("interleaved", [False, True])
def test_float8_columns_are_decoded(tmp_path: Path, interleaved: bool) -> None:
    tensors, patterns, decoded = encoded(
        random_weights(GATED),
        "fp8_block",
        lambda weights: joined(weights, interleaved=interleaved, transposed=True),
    )
    both = decoded["1.gate_up"].mT
    gate, up = (both[:, 0::2], both[:, 1::2]) if interleaved else both.chunk(2, 1)
    held = load(write(tmp_path, tensors), describe(GATED, patterns))
    assert_holds(held, GATED, {"gate": gate, "up": up, "down": decoded["1.down"].mT})


def test_float8_factors_in_bfloat16_are_the_same_numbers(tmp_path: Path) -> None:
    tensors, patterns, _ = encoded(random_weights(GATED), "fp8_block", separate)
    factors = {name: tensor.bfloat16() for name, tensor in tensors.items() if name.endswith(".scales")}
    narrow = load(write(tmp_path / "narrow", tensors | factors), describe(GATED, patterns))
    widened = tensors | {name: tensor.float() for name, tensor in factors.items()}
    wide = load(write(tmp_path / "wide", widened), describe(GATED, patterns))
    for slot, held in narrow.items():
        for one, other in (
            (held.expert.up, wide[slot].expert.up),
            (held.expert.down, wide[slot].expert.down),
        ):
            assert torch.equal(matrix(one)[0], matrix(other)[0])


def test_biases_beside_encoded_weights_are_read_as_they_are(tmp_path: Path) -> None:
    weights = random_weights(BIASED)
    tensors, patterns, _ = encoded(
        weights, "mxfp4", lambda weights: joined(weights, interleaved=True, transposed=False)
    )
    for slot, held in load(write(tmp_path, tensors), describe(BIASED, patterns)).items():
        expected = torch.cat([weights["gate_bias"][slot], weights["up_bias"][slot]])
        assert torch.equal(matrix(held.expert.up)[1], expected)


@encodings
def test_the_version_of_an_encoded_expert_is_that_of_its_code(tmp_path: Path, encoding: Encoding) -> None:
    tensors, patterns, _ = encoded(random_weights(GATED), encoding, separate)
    model = describe(GATED, patterns)
    before = load(write(tmp_path / "one", tensors), model)
    again = load(write(tmp_path / "two", tensors), model, torch.bfloat16)
    assert [held.version for held in before.values()] == [held.version for held in again.values()]
    for name in ("1.experts.1.up", "1.experts.1.up.scales"):
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        changed[name].view(torch.uint8).view(-1)[0] ^= 1
        after = load(write(tmp_path / name, changed), model)
        differ = [slot for slot in range(SLOTS) if after[slot].version != before[slot].version]
        assert differ == [1]


@pytest.mark.parametrize(
    ("encoding", "tensor", "code"),
    [
        ("fp8_block", "up", 0x7F),  # no number
        ("fp8_block", "up.scales", None),  # infinity
        ("mxfp4", "up.scales", 255),  # no number
        ("mxfp4", "up.scales", 254),  # too large a power for 6
    ],
)
def test_codes_that_stand_for_no_finite_number_are_refused_by_tensor(
    tmp_path: Path, encoding: Encoding, tensor: str, code: int | None
) -> None:
    tensors, patterns, _ = encoded(random_weights(GATED), encoding, separate)
    name = f"1.experts.2.{tensor}"
    if code is None:
        tensors[name][0, 0] = float("inf")
    else:
        tensors[name].view(torch.uint8).view(-1)[0] = code
    if (encoding, code) == ("mxfp4", 254):
        tensors["1.experts.2.up"].view(-1)[:16] = 0x77  # 6 and 6
    with pytest.raises(CheckpointError, match="NaN or infinity") as caught:
        load(write(tmp_path, tensors), describe(GATED, patterns))
    assert caught.value.field == "1.experts.2.up"


@pytest.mark.parametrize(
    ("encoding", "arrange"),
    [
        (encoding, arrange)
        for encoding in ("plain", *ENCODINGS)
        for name, arrange in LAYOUTS.items()
        # Groups along a row are never stored as columns.
        if not (encoding == "mxfp4" and "transposed" in name)
    ],
)
def test_no_more_is_read_than_the_expert(tmp_path: Path, encoding: str, arrange: object) -> None:
    """By the kernel's own count of bytes; every byte once, though gate and up may share what holds them."""
    weights = random_weights(GATED)
    if encoding == "plain":
        tensors, patterns = arrange(weights)  # type: ignore[operator]
    else:
        tensors, patterns, _ = encoded(weights, encoding, arrange)  # type: ignore[arg-type]
    checkpoint, model = write(tmp_path, tensors), describe(GATED, patterns)
    address = ExpertAddress(1, 1)
    expected = stored_bytes(checkpoint, model.experts[1], address)
    whole = sum(tensor.nbytes for tensor in tensors.values())
    before = bytes_read()
    list(load_experts(checkpoint, model, [address], ExpertForm(CPU, torch.float32)))
    read = bytes_read() - before
    assert expected <= read < expected + 4096  # reading the count counts, too
    # Half a block of float8 scales may belong to both halves.
    assert whole // SLOTS <= expected <= whole // SLOTS + 64


def bytes_read() -> int:
    """That this process has asked the kernel for."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])
