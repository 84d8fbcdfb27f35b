"""What of a checkpoint lives in the router: everything but the experts, counted in bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.checkpoints import random_mixtral, write_mixtral

from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.errors import CheckpointError
from moesaic.families import describe_model
from moesaic.families.model import Attention
from moesaic.settings import Decoder
from router.attention.views import AttentionLayout
from router.decoders.decoder import RouterModel
from router.decoders.load import load_model
from router.phase_clock import PhaseClock

NUM_POSITIONS = 256


def load(folder: Path, decoder: Decoder = "auto") -> RouterModel:
    checkpoint = open_checkpoint(folder)
    model = describe_model(checkpoint)
    return load_model(
        checkpoint,
        model,
        AttentionLayout.of(model.mixers, block_tokens=16, device=torch.device("cpu"), dtype=torch.float32),
        decoder=decoder,
        num_positions=NUM_POSITIONS,
        clock=PhaseClock(),
    )


@pytest.mark.parametrize("layout", ["classic", "fused"])
@pytest.mark.parametrize("decoder", ["lean", "hf"])
def test_expert_tensors_never_enter_the_router(
    tmp_path: Path,
    layout: Literal["classic", "fused"],
    decoder: Literal["lean", "hf"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_mixtral(tmp_path, layout=layout)
    shape = describe_model(open_checkpoint(folder))
    read: list[str] = []

    class Recording:
        """The library's reader, with a list of what was asked of it."""

        def __init__(self, file: Path, framework: str) -> None:
            self._file = safe_open(file, framework=framework)

        def __enter__(self) -> Recording:
            self._opened = self._file.__enter__()
            return self

        def __exit__(self, *exc_info: object) -> None:
            self._file.__exit__(*exc_info)

        def get_slice(self, name: str) -> Any:
            read.append(name)
            return self._opened.get_slice(name)

    monkeypatch.setattr("router.decoders.dense_tensors.safe_open", Recording)
    model = load(folder, decoder)

    dense_bytes = sum(
        parameter.nbytes for name, parameter in random_mixtral().named_parameters() if ".experts." not in name
    )
    mixer = shape.mixers[0]
    assert isinstance(mixer, Attention)
    half = mixer.head_dim // 2
    rotary_bytes = {
        "hf": 2 * half * 4,  # frequencies are computed, twice: as they are, as they were
        "lean": NUM_POSITIONS * half * 8,  # cosine and sine of every position
    }[decoder]
    assert model.weight_bytes == dense_bytes + rotary_bytes
    assert not set(read) & shape.expert_tensors
    assert len(read) == len(set(read))


def test_tied_embeddings_are_held_once_unless_the_head_wants_them_in_another_form(tmp_path: Path) -> None:
    untied = write_mixtral(tmp_path / "untied")
    tied = write_mixtral(tmp_path / "tied", tie_word_embeddings=True)
    embedding_bytes = 96 * 32 * 4
    assert load(untied, "hf").weight_bytes - load(tied, "hf").weight_bytes == embedding_bytes
    assert load(untied, "lean").weight_bytes == load(tied, "lean").weight_bytes


def test_a_tensor_that_is_no_part_of_the_model_is_named(tmp_path: Path) -> None:
    folder = write_mixtral(tmp_path)
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, file)
    for decoder in ("lean", "hf"):
        with pytest.raises(CheckpointError, match=r"q_proj\.bias"):
            load(folder, decoder)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = write_mixtral(tmp_path)
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys() if name != "model.norm.weight"}  # noqa: SIM118
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as missing:
        load(folder)
    assert "model.norm.weight" in missing.value.message
