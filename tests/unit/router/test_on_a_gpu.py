"""What a GPU would punish, mostly seen without one: on a device of fake tensors no operation may mix that device with the host, and
nothing may look at a number, which on a GPU waits for all that was launched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.checkpoints import write_mixtral
from support.encoder_decoders import write_nllb, write_switch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)

from moesaic.checkpoints.checkpoint import Checkpoint, open_checkpoint
from moesaic.families import describe_model
from moesaic.families.model import Attention, DenseTensor
from router.attention.packed_batch import pack
from router.attention.paged import attend
from router.attention.views import AttentionLayout
from router.cache.kv_cache import KVCache
from router.decoders.decoder import MicroBatch
from router.decoders.encoder_decoder import weights as encoder_decoder_weights
from router.decoders.lean import weights as lean_weights
from router.decoders.load import load_model
from router.dispatch.combine import combine
from router.dispatch.dispatcher import DispatchStep
from router.dispatch.host_staging import staging_for
from router.phase_clock import PhaseClock
from router.scheduling.block_pool import BlockPool
from router.scheduling.sequence import Chunk, Sequence

# Not the host, and without numbers. In a build of torch without CUDA a fake `cuda` cannot even be indexed.
DEVICE = torch.device("meta")
BLOCK_TOKENS = 4


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode:
        yield mode


class DeviceExperts:
    """A DispatchStep that never leaves the device."""

    def __init__(self) -> None:
        self.failed: dict[int, Any] = {}

    def send(
        self, layer: int, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, **_: Any
    ) -> Any:
        assert {tensor.device for tensor in (hidden, slots, weights)} == {DEVICE}
        assert weights.dtype == torch.float32
        return hidden, slots, weights

    def receive(self, call: Any) -> torch.Tensor:
        hidden, slots, weights = call
        return combine(hidden[:, None].expand(-1, slots.shape[1], -1), weights).to(hidden.dtype)


class WantedRows:
    """A tensor of the host, whose numbers are known where no others are."""

    def __init__(self, rows: list[int]) -> None:
        self._rows = rows

    def tolist(self) -> list[int]:
        return self._rows

    def to(self, device: torch.device) -> torch.Tensor:
        return torch.tensor(self._rows).to(device)


def test_the_stand_in_for_a_gpu_refuses_what_a_gpu_punishes(fake: FakeTensorMode) -> None:
    on_device = torch.ones(3, device=DEVICE)
    with pytest.raises(FakeTensorDeviceMismatchError):
        on_device + torch.ones(3)
    with pytest.raises(DataDependentOutputException):
        on_device.sum().item()


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_whole_step_stays_on_the_device_and_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invariant: bool, window: int | None, dtype: torch.dtype
) -> None:
    checkpoint = open_checkpoint(write_mixtral(tmp_path / "model"))
    shape = describe_model(checkpoint)
    mixers = [replace(cast(Attention, mixer), window=window) for mixer in shape.mixers]
    monkeypatch.setattr(lean_weights, "read_dense", _read_nothing)
    wanted = cast(torch.Tensor, WantedRows([8, 9, 15, 16, 17]))
    # What torch.tensor makes on `meta` is no fake yet.
    with FakeTensorMode(allow_non_fake_inputs=True):
        layout = AttentionLayout.of(
            mixers, block_tokens=BLOCK_TOKENS, device=DEVICE, dtype=dtype, invariant=invariant
        )
        model = load_model(checkpoint, shape, layout, decoder="lean", num_positions=64, clock=PhaseClock())
        cache = KVCache(mixers, num_blocks=64, block_tokens=BLOCK_TOKENS, dtype=dtype, device=DEVICE)
        # A prompt, one that decodes, the end of a prompt, and two that decode beside it.
        batch = pack(_chunks((0, 9), (5, 1), (4, 6), (11, 1), (12, 1)), layout)
        experts = cast(DispatchStep, DeviceExperts())
        logits = model.forward([MicroBatch(batch, wanted, experts)], cache)
    assert logits.device == DEVICE and logits.shape == (5, shape.vocab_size)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("mixer", [Attention(6, 2, 8, sinks=True), Attention(6, 2, 8, chunk=6, sinks=True)])
def test_sinks_and_chunks_stay_on_the_device(mixer: Attention, invariant: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        layout = AttentionLayout.of(
            [mixer], block_tokens=BLOCK_TOKENS, device=DEVICE, dtype=torch.bfloat16, invariant=invariant
        )
        cache = KVCache(
            [mixer], num_blocks=64, block_tokens=BLOCK_TOKENS, dtype=torch.bfloat16, device=DEVICE
        )
        batch = pack(_chunks((0, 9), (5, 1), (4, 6), (11, 1), (12, 1)), layout)
        queries, sinks = (
            torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
            for shape in ((batch.num_tokens, 6, 8), (6,))
        )
        attended = attend(0, queries, batch, cache, 0.3, sinks)
    assert attended.device == DEVICE and attended.shape == (batch.num_tokens, 48)


@pytest.mark.parametrize("write", [write_switch, write_nllb])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_encoder_and_decoder_stay_on_the_device(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, int], object],
    dtype: torch.dtype,
) -> None:
    write(tmp_path, 0)
    checkpoint = open_checkpoint(tmp_path)
    shape = describe_model(checkpoint)
    monkeypatch.setattr(encoder_decoder_weights, "read_dense", _read_nothing)
    # A prompt of 19 tokens with one that follows it, and two that decode.
    chunks = _chunks((0, 20), (19, 1), (22, 1))
    for chunk in chunks:
        chunk.sequence.tokens += range(5)
    wanted = cast(torch.Tensor, WantedRows([19, 20, 21]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        layout = AttentionLayout.of(shape.mixers, block_tokens=BLOCK_TOKENS, device=DEVICE, dtype=dtype)
        model = load_model(checkpoint, shape, layout, decoder="auto", num_positions=64, clock=PhaseClock())
        cache = KVCache(shape.mixers, num_blocks=64, block_tokens=BLOCK_TOKENS, dtype=dtype, device=DEVICE)
        experts = cast(DispatchStep, DeviceExperts())
        logits = model.forward([MicroBatch(pack(chunks, layout), wanted, experts)], cache)
    assert logits.device == DEVICE and logits.shape == (3, shape.vocab_size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_reach_the_host_whole_and_go_back_as_they_landed() -> None:
    device = torch.device("cuda")
    staging = staging_for(device)
    for seed in range(20):  # pinned memory is used again and again
        rows = torch.full((512, 4096), float(seed), device=device) @ torch.eye(4096, device=device)
        slots = torch.arange(2048, device=device).view(512, 4)[:, :2]
        on_host, of_slots = staging.to_host([rows, slots])
        assert (on_host == seed).all() and of_slots.is_contiguous() and torch.equal(of_slots, slots.cpu())
        landed = staging.empty((512, 4096), torch.float32).copy_(on_host + 1)
        back = staging.to_device(landed)
        del landed
        staging.empty((512, 4096), torch.float32).zero_()
        assert (back == seed + 1).all()


def _chunks(*spans: tuple[int, int]) -> tuple[Chunk, ...]:
    pool = BlockPool(64, BLOCK_TOKENS)
    chunks = []
    for number, (start, num_tokens) in enumerate(spans):
        sequence = Sequence(str(number), list(range(1, 20)), 19)
        pool.extend(sequence.blocks, start + num_tokens)
        chunks.append(Chunk(sequence, start, num_tokens))
    return tuple(chunks)


def _read_nothing(
    checkpoint: Checkpoint,
    dense: Mapping[str, DenseTensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    exact: Collection[str] = (),
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in dense.items():
        own = torch.float32 if name in exact else dtype
        yield name, torch.empty(tensor.shape, dtype=own, device=device)
