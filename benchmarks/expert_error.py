"""How holding the experts in fewer bits changes a model's answers: its logits, and the perplexity of a text.

The model is that of `transformers` in float32; only its experts are ours, in the form in which a worker holds
them. They come from the checkpoint as it is, and from copies of it whose experts are stored in 8 and in 4
bits, as some models are published. The file of such a copy already has a loss, and the loss of holding its
experts in another form is added to it.

Shapes: W windows of a text, T tokens of one, V vocabulary, K experts a token, D hidden size, O and I rows and
columns.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from expert_worker.experts.expert import Expert, choose_form
from expert_worker.experts.loader import load_experts
from expert_worker.experts.stored_weight import StoredWeight, locate, stored_bytes
from moesaic.checkpoints.checkpoint import CONFIG_FILE, SINGLE_FILE, Checkpoint, open_checkpoint
from moesaic.epoch import ExpertAddress
from moesaic.families import MoeModel, describe_model
from moesaic.families.model import Encoding, WeightPattern
from moesaic.families.tensor_check import FP8_BLOCK, MXFP4_GROUP
from moesaic.settings import ExpertDType

EXPERT_DTYPES: tuple[ExpertDType, ...] = ("fp32", "bf16", "int8", "int4")
WINDOW_TOKENS = 256
NUM_WINDOWS = 24
NAME = "moesaic-held-experts"
MIB = 1 << 20
LARGEST_FP8 = 448.0
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

Experts = Mapping[ExpertAddress, Expert]


@dataclass(frozen=True, slots=True)
class Error:
    """The differences from the model whose experts are transformers' own, in float32."""

    stored: str
    held: str
    stored_mib: float  # size of one expert in the file
    expert_mib: float  # size of one expert in memory
    logit_max: float
    logit_mean: float
    divergence: float  # KL, in nats a token
    same_choice: float  # share of positions with the same likeliest token
    perplexity: float


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint, the form in which it stores its experts, and its model."""

    stored: str
    checkpoint: Checkpoint
    model: MoeModel

    @property
    def stored_mib(self) -> float:
        """The size of an expert of the first layer that has experts."""
        address = self.model.addresses[0]
        return stored_bytes(self.checkpoint, self.model.experts[address.layer], address) / MIB


def measure_errors(folder: Path, text: str | None) -> list[Error]:
    """Measures transformers itself, then every form of the experts. Without a text, the model writes one."""
    checkpoint = open_checkpoint(folder)
    plain = Source("as it is", checkpoint, describe_model(checkpoint))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = _windows(folder, model, text)
    expected = _logits(model, windows)
    errors = [
        Error("transformers", "fp32", plain.stored_mib, 0, *_compare(expected, expected, windows)),
    ]
    ALL_EXPERTS_FUNCTIONS.register(NAME, _compute)
    model.set_experts_implementation(NAME)
    with tempfile.TemporaryDirectory() as copies:
        for source in (plain, *(_encode(plain, name, Path(copies, name)) for name in ENCODERS)):
            for expert_dtype in EXPERT_DTYPES:
                experts = _load(source, expert_dtype)
                for index, layer in enumerate(model.get_decoder().layers):
                    layer.mlp.experts.held = {
                        address.slot: expert for address, expert in experts.items() if address.layer == index
                    }
                held = sum(expert.num_bytes for expert in experts.values()) / len(experts) / MIB
                found = _compare(_logits(model, windows), expected, windows)
                errors.append(Error(source.stored, expert_dtype, source.stored_mib, held, *found))
    return errors


def _load(source: Source, expert_dtype: ExpertDType) -> Experts:
    form = choose_form(
        expert_dtype,
        torch.device("cpu"),
        torch.float32,
        (experts.module for experts in source.model.experts.values()),
        batch_invariant=False,
    )
    loaded = load_experts(source.checkpoint, source.model, source.model.addresses, form)
    return {address: held.expert for address, held in loaded}


def _encode(source: Source, encoding: Encoding, folder: Path) -> Source:
    """A checkpoint in `folder` that holds the experts alone, stored in an encoding."""
    pattern = "{layer}.{slot}."
    tensors: dict[str, torch.Tensor] = {}
    for address in source.model.addresses:
        experts = source.model.experts[address.layer]
        for weight, where in locate(source.checkpoint, experts, address).items():
            name = pattern.format(layer=address.layer, slot=address.slot) + weight
            codes, scales = ENCODERS[encoding](read_plain(where).float())
            tensors |= {name: codes, f"{name}.scales": scales}
    folder.mkdir()
    save_file(tensors, folder / SINGLE_FILE)
    (folder / CONFIG_FILE).write_text("{}")
    layout = {
        weight: WeightPattern(pattern + weight, encoding=encoding, scales=f"{pattern}{weight}.scales")
        for weight in source.model.experts[source.model.addresses[0].layer].module.weights
    }
    encoded = {layer: replace(experts, layout=layout) for layer, experts in source.model.experts.items()}
    return Source(encoding, open_checkpoint(folder), replace(source.model, experts=encoded))


def read_plain(where: StoredWeight) -> torch.Tensor:
    """A weight [O, I] that is stored without an encoding."""
    own = where.data.read()[where.rows, where.columns]
    return own.T if where.transposed else own


def encode_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 codes, and scales that map each block of 128 x 128 to all of float8's range."""
    rows, columns = (-(-size // FP8_BLOCK) for size in weight.shape)
    blocks = weight.new_zeros(rows * FP8_BLOCK, columns * FP8_BLOCK)
    blocks[: weight.shape[0], : weight.shape[1]] = weight
    blocks = blocks.view(rows, FP8_BLOCK, columns, FP8_BLOCK)
    scales = blocks.abs().amax((1, 3)).clamp_min(1e-30) / LARGEST_FP8
    coded = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).view(rows * FP8_BLOCK, -1)
    return coded[: weight.shape[0], : weight.shape[1]].contiguous(), scales


def encode_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """4-bit floats, two a byte, and for each 32 the power of two that brings the largest near to 6."""
    groups = weight.unflatten(1, (-1, MXFP4_GROUP))
    powers = groups.abs().amax(-1).clamp_min(2.0**-100).log2().floor() - 2
    scaled = groups / powers.exp2()[..., None]
    codes = (scaled.abs()[..., None] - MAGNITUDES).abs().argmin(-1) + 8 * (scaled < 0)
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return (low + 16 * high).to(torch.uint8), (powers + 127).to(torch.uint8)


ENCODERS: Mapping[Encoding, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "fp8_block": encode_fp8,
    "mxfp4": encode_mxfp4,
}


def _compute(module: Any, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The experts seam of transformers: hidden [T, D], slots and weights [T, K] -> [T, D]."""
    total = torch.zeros_like(hidden)
    for slot, expert in module.held.items():
        rows, ranks = (slots == slot).nonzero(as_tuple=True)
        if len(rows):
            total.index_add_(0, rows, expert(hidden[rows]).float() * weights[rows, ranks, None])
    return total


def _windows(folder: Path, model: Any, text: str | None) -> torch.Tensor:
    """[W, T] token ids, spread over the text."""
    if text is None:
        torch.manual_seed(0)
        start = torch.full((NUM_WINDOWS, 1), model.config.bos_token_id or 0)
        return model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            min_length=WINDOW_TOKENS,
            max_length=WINDOW_TOKENS,
            pad_token_id=0,
        )
    token_ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"])
    windows = token_ids[: len(token_ids) // WINDOW_TOKENS * WINDOW_TOKENS].view(-1, WINDOW_TOKENS)
    return windows[:: max(1, len(windows) // NUM_WINDOWS)][:NUM_WINDOWS]


@torch.inference_mode()
def _logits(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """[W, T, V]."""
    return torch.cat([model(window[None]).logits for window in windows])


def _compare(
    logits: torch.Tensor, expected: torch.Tensor, windows: torch.Tensor
) -> tuple[float, float, float, float, float]:
    """The last five fields of an Error."""
    # Window by window, because several copies of [W, T, V] would take much memory.
    parts: list[Sequence[float]] = []
    for got, want, tokens in zip(logits, expected, windows, strict=True):
        likely, wanted = got.log_softmax(-1), want.log_softmax(-1)
        parts.append(
            (
                float((got - want).abs().max()),
                float((got - want).abs().mean()),
                # Rounding may make a very small divergence negative.
                max(0.0, float(F.kl_div(likely, wanted, reduction="batchmean", log_target=True))),
                float((got.argmax(-1) == want.argmax(-1)).float().mean()),
                float(F.nll_loss(likely[:-1], tokens[1:])),
            )
        )
    most, mean, divergence, same, loss = zip(*parts, strict=True)
    return (
        max(most),
        statistics.mean(mean),
        statistics.mean(divergence),
        statistics.mean(same),
        float(torch.tensor(statistics.mean(loss)).exp()),
    )
