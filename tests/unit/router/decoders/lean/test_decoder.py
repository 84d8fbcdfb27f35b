"""Our own decoder against the modules of transformers, and what it says no to."""

from __future__ import annotations

import json
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.checkpoints import TINY_MIXTRAL, write_mixtral
from support.random_models import random_model, write_model
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.errors import InvalidArgument, Unsupported
from moesaic.families import DenseLayers, describe_model
from moesaic.settings import Decoder
from router.attention.packed_batch import pack
from router.attention.rotary import rotary_turns
from router.attention.views import AttentionLayout
from router.cache.kv_cache import KVCache
from router.decoders.decoder import MicroBatch, RouterModel
from router.decoders.hf.decoder import HfDecoder
from router.decoders.lean.decoder import LeanDecoder
from router.decoders.load import load_model
from router.dispatch.dispatcher import DispatchStep
from router.phase_clock import PhaseClock
from router.scheduling.block_pool import BlockPool
from router.scheduling.sequence import Chunk, Sequence

BLOCK_TOKENS = 4


class LocalExperts:
    """A DispatchStep whose expert of a slot scales by the slot's number; it notes what was asked and taken, in order."""

    def __init__(self, name: str = "", log: list[str] | None = None) -> None:
        self.failed: dict[int, Any] = {}
        self.tokens: Items[int] | None = None
        self._name = name
        self._log = log if log is not None else []

    def send(
        self,
        layer: int,
        hidden: torch.Tensor,
        slots: torch.Tensor,
        weights: torch.Tensor,
        *,
        tokens: Items[int] | None = None,
    ) -> tuple[int, torch.Tensor]:
        self._log.append(f"send {self._name}{layer}")
        self.tokens = tokens
        return layer, hidden * (weights * (1 + slots)).sum(1, keepdim=True)

    def receive(self, call: tuple[int, torch.Tensor]) -> torch.Tensor:
        self._log.append(f"receive {self._name}{call[0]}")
        return call[1]

    def compute(self, *layer: Any) -> torch.Tensor:
        return self.receive(self.send(*layer))


class Harness:
    """A decoder with a cache of its own."""

    def __init__(
        self, folder: Path, decoder: Decoder, dense_layers: DenseLayers = "auto", *, invariant: bool = False
    ) -> None:
        checkpoint = open_checkpoint(folder)
        shape = describe_model(checkpoint, dense_layers)
        layout = AttentionLayout.of(
            shape.mixers,
            block_tokens=BLOCK_TOKENS,
            device=torch.device("cpu"),
            dtype=torch.float32,
            invariant=invariant,
        )
        self.model: RouterModel = load_model(
            checkpoint, shape, layout, decoder=decoder, num_positions=256, clock=PhaseClock()
        )
        self.pool = BlockPool(64, BLOCK_TOKENS)
        self.cache = KVCache(
            shape.mixers,
            num_blocks=64,
            block_tokens=BLOCK_TOKENS,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )

    def sequence(self, name: str, tokens: list[int]) -> Sequence:
        sequence = Sequence(name, tokens, len(tokens))
        self.pool.extend(sequence.blocks, len(tokens))
        return sequence

    def part(self, chunks: Items[Chunk], experts: LocalExperts | None = None) -> MicroBatch:
        batch = pack(tuple(chunks), self.model.layout)
        return MicroBatch(
            batch, torch.arange(batch.num_tokens), cast(DispatchStep, experts or LocalExperts())
        )

    def run(self, *parts: Items[Chunk]) -> torch.Tensor:
        return self.model.forward([self.part(part) for part in parts], self.cache)


def prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 96, (length,), generator=generator).tolist()


CONFIGS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "every head its own keys": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "own head size": {"head_dim": 12},
    "sliding window": {"sliding_window": 5},
    "tied embeddings": {"tie_word_embeddings": True},
    "other constants": {
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
}


SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, tuple[str, DenseLayers, dict[str, Any]]] = {
    "mistral in the router": ("mistral", "router", {"head_dim": 12, "sliding_window": 7}),
    "mistral as experts": ("mistral", "experts", {"head_dim": 12, "sliding_window": None}),
    "qwen2_moe": ("qwen2_moe", "auto", {"num_experts": 4, "shared_expert_intermediate_size": 20, **MOE}),
    "qwen3_moe, one layer dense": (
        "qwen3_moe",
        "router",
        {"num_local_experts": 4, "head_dim": 12, "norm_topk_prob": True, "mlp_only_layers": [0], **MOE},
    ),
    "olmoe": ("olmoe", "auto", {"num_experts": 4, "num_experts_per_tok": 3}),
}


@pytest.fixture(params=[*CONFIGS, *FAMILIES])
def known_model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, DenseLayers]:
    """A checkpoint of every kind that the lean decoder knows."""
    if request.param in CONFIGS:
        return write_mixtral(tmp_path, seed=5, **CONFIGS[request.param]), "auto"
    family, dense_layers, overrides = FAMILIES[request.param]
    return write_model(random_model(family, 5, **SIZES, **overrides), tmp_path), dense_layers


def test_lean_and_hf_give_the_same_logits_for_prompts_decodes_and_both_at_once(
    known_model: tuple[Path, DenseLayers],
) -> None:
    folder, dense_layers = known_model
    logits: dict[str, list[torch.Tensor]] = {}
    for decoder in ("lean", "hf"):
        harness = Harness(folder, decoder, dense_layers)
        a, b, c = (
            harness.sequence(name, prompt(length)) for name, length in zip("abc", (21, 9, 150), strict=True)
        )
        logits[decoder] = [
            harness.run([Chunk(a, 0, 20), Chunk(b, 0, 3)]),
            harness.run([Chunk(a, 20, 1), Chunk(b, 3, 1), Chunk(c, 0, 149)]),
            harness.run([Chunk(c, 149, 1), Chunk(b, 4, 5)]),
        ]
    for lean, hf in zip(logits["lean"], logits["hf"], strict=True):
        torch.testing.assert_close(lean, hf, atol=1e-5, rtol=1e-5)


def test_positions_turn_by_the_very_numbers_of_transformers() -> None:
    parameters = {"rope_type": "default", "rope_theta": 1e4}
    config = MixtralConfig(**TINY_MIXTRAL, head_dim=16, rope_parameters=parameters)
    reference = MixtralRotaryEmbedding(config)
    cos, sin = reference(torch.zeros(1), torch.arange(256)[None])
    turns = rotary_turns(256, 16, 1e4)[:, 0]
    assert torch.equal(turns.real, cos[0, :, :8])
    assert torch.equal(turns.imag, sin[0, :, :8])


def test_of_two_parts_one_is_with_the_experts_while_the_other_is_here(tmp_path: Path) -> None:
    harness = Harness(write_mixtral(tmp_path), "lean")
    log: list[str] = []
    a, b = (harness.sequence(name, prompt(6)) for name in "ab")
    parts = [
        harness.part([Chunk(sequence, 0, 6)], LocalExperts(sequence.sequence_id, log)) for sequence in (a, b)
    ]
    together = harness.model.forward(parts, harness.cache)

    sends_and_receives = "send a0, send b0, receive a0, send a1, receive b0, send b1, receive a1, receive b1"
    assert ", ".join(log) == sends_and_receives
    alone = torch.cat([harness.run([Chunk(sequence, 0, 6)]) for sequence in (a, b)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_the_last_experts_get_only_the_tokens_whose_logits_are_wanted(tmp_path: Path) -> None:
    harness = Harness(write_mixtral(tmp_path), "lean")
    sequence = harness.sequence("a", prompt(9))
    every = harness.part([Chunk(sequence, 0, 9)])
    logits = harness.model.forward([every], harness.cache)
    for rows in ([8], [2, 5], []):
        log: list[str] = []
        experts = LocalExperts(log=log)
        some = MicroBatch(every.batch, torch.tensor(rows, dtype=torch.long), cast(DispatchStep, experts))
        torch.testing.assert_close(harness.model.forward([some], harness.cache), logits[rows])
        assert log == ["send 0", "receive 0"] + ["send 1", "receive 1"] * bool(rows)
        assert (experts.tokens or []) == rows


def test_a_batch_invariant_step_gives_the_same_bits_whoever_else_is_in_it_and_however_it_is_cut(
    known_model: tuple[Path, DenseLayers],
) -> None:
    folder, dense_layers = known_model
    harness = Harness(folder, "lean", dense_layers, invariant=True)
    long, short, other = (
        harness.sequence(name, prompt(length)) for name, length in zip("lso", (83, 5, 70), strict=True)
    )
    whole = harness.run([Chunk(long, 0, 83)])
    sevens = torch.cat([harness.run([Chunk(long, at, min(7, 83 - at))]) for at in range(0, 83, 7)])
    singles = torch.cat([harness.run([Chunk(long, at, 1)]) for at in range(83)])
    mixed = torch.cat(
        (
            harness.run([Chunk(short, 0, 5), Chunk(long, 0, 60)])[5:],
            harness.run([Chunk(other, 0, 69), Chunk(long, 60, 22)])[69:],
            harness.run([Chunk(other, 69, 1), Chunk(short, 4, 1), Chunk(long, 82, 1)])[2:],
        )
    )
    in_parts = torch.cat(
        (
            harness.run([Chunk(long, 0, 40)], [Chunk(long, 40, 30), Chunk(short, 0, 5)])[:70],
            harness.run([Chunk(long, 70, 13)]),
        )
    )
    for run in (sevens, singles, mixed, in_parts):
        assert torch.equal(run, whole)


def change_config(folder: Path, **values: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


UNKNOWN: dict[str, dict[str, Any]] = {
    "rope_scaling": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "rope_parameters": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "logit_scale": {"logit_scale": 0.5},
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_a_config_that_it_does_not_know_is_refused_by_name_and_left_to_transformers(
    tmp_path: Path, key: str
) -> None:
    folder = change_config(write_mixtral(tmp_path), **UNKNOWN[key])
    with pytest.raises(Unsupported, match=key) as refused:
        Harness(folder, "lean")
    assert refused.value.field == "engine.decoder"
    assert isinstance(Harness(folder, "auto").model, HfDecoder)
    with pytest.raises(Unsupported, match=key):
        Harness(folder, "auto", invariant=True)


def test_what_it_knows_it_runs_unless_hf_is_asked_for(tmp_path: Path) -> None:
    folder = write_mixtral(tmp_path)
    assert isinstance(Harness(folder, "auto").model, LeanDecoder)
    assert isinstance(Harness(folder, "hf").model, HfDecoder)
    with pytest.raises(InvalidArgument, match="batch_invariant"):
        Harness(folder, "hf", invariant=True)
