"""StripedHyena: what its authors' code computes, by experts in other processes and by states that come and go.

The goldens were computed by the reference in one pass by FFT and token by token; the random models of other shapes are
held against the reference of tests/support, which only knows the recurrence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.local_router import local_router, lonely_router, router_config
from support.processes import running_router, running_workers
from support.striped_hyena import EVO, Reference, write_striped_hyena
from support.views import whole

from moesaic.client.sync_client import SyncClient
from moesaic.epoch import Epoch
from router.assembly import load_router
from router.attention.packed_batch import pack
from router.attention.rotary import pairs_side_by_side
from router.cache.kv_cache import Contexts
from router.decoders.decoder import MicroBatch
from router.decoders.stripedhyena.filters import by_role
from router.engine.overlap import halves
from router.phase_clock import PhaseClock
from router.scheduling.scheduler import Limits, Scheduler
from router.scheduling.sequence import Sequence
from router.workers.replica_pool import ReplicaPool

LOGITS_TOLERANCE = 1e-4


@pytest.fixture(params=["", "flash_rmsnorm."])
def norm(request: pytest.FixtureRequest) -> str:
    """Prefix of the golden outputs under either formula of the norm."""
    return str(request.param)


@pytest.fixture
def golden(shared: Path, norm: str, tmp_path: Path) -> Path:
    """The golden's checkpoint, set to one of the norms."""
    source = shared / "goldens" / "stripedhyena" / "checkpoint"
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_flash_rmsnorm": bool(norm)}))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    return tmp_path


@pytest.fixture
def inputs(shared: Path) -> list[list[int]]:
    tokens: list[list[int]] = load_file(shared / "goldens" / "stripedhyena" / "inputs.safetensors")[
        "input_ids"
    ].tolist()
    return tokens


@pytest.fixture
def expected(shared: Path) -> dict[str, torch.Tensor]:
    return load_file(shared / "goldens" / "stripedhyena" / "expected.safetensors")


@pytest.mark.shared
@pytest.mark.parametrize("shares", [["all"], ["0:0,2:0", "1:0", "3:0"]])
def test_goldens_through_workers_whole_in_chunks_and_token_by_token(
    golden: Path,
    norm: str,
    shares: list[str],
    inputs: list[list[int]],
    expected: dict[str, torch.Tensor],
) -> None:
    with (
        running_workers(golden, shares) as workers,
        local_router(golden, [worker.address for worker in workers]) as router,
    ):
        runs = [router.run(inputs, num_new=12, max_batch_tokens=budget) for budget in (512, 7, 1)]
    for logits, tokens in runs:
        for index, rows in enumerate(logits):
            torch.testing.assert_close(
                rows[:48], expected[f"{norm}logits"][index], atol=LOGITS_TOLERANCE, rtol=0
            )
            torch.testing.assert_close(
                rows[32:48], expected[f"{norm}decode_logits"][index], atol=LOGITS_TOLERANCE, rtol=0
            )
            if not norm:
                assert tokens[index] == expected["greedy_tokens"][index].tolist()
                torch.testing.assert_close(
                    rows[47:59], expected["greedy_logits"][index], atol=LOGITS_TOLERANCE, rtol=0
                )


@pytest.mark.shared
def test_goldens_with_the_mlps_in_the_router(
    golden: Path, norm: str, inputs: list[list[int]], expected: dict[str, torch.Tensor]
) -> None:
    router = lonely_router(golden, dense_layers="router")
    for budget in (512, 5):
        logits, _ = router.run(inputs, num_new=1, max_batch_tokens=budget)
        for index, rows in enumerate(logits):
            torch.testing.assert_close(
                rows[:48], expected[f"{norm}logits"][index], atol=LOGITS_TOLERANCE, rtol=0
            )


VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "standalone names": {"prefix": ""},
    "Evo": EVO,
    "Evo with separate heads of queries alone": EVO | {"smeared_gqa": True, "tie_embeddings": False},
    "channels in thirds, no bias of the short filter": {
        "column_split_hyena": False,
        "short_filter_bias": False,
    },
    "a longer short filter, one head of keys": {"short_filter_length": 5, "proj_groups": 4, "state_size": 3},
    "no attention": {"attn_layer_idxs": [], "hyena_layer_idxs": [0, 1, 2, 3]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_models_of_any_shape_equal_the_recurrence(variant: str, tmp_path: Path) -> None:
    folder = write_striped_hyena(tmp_path, seed=5, **VARIANTS[variant])
    reference = Reference(folder)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(0, 96, (length,), generator=generator).tolist() for length in (1, 2, 3, 11, 70, 150)
    ]
    expected = [reference.logits(prompt) for prompt in prompts]
    greedy = [reference.generate(prompt, 4) for prompt in prompts[:4]]
    router = lonely_router(folder)
    for budget in (512, 16):
        logits, tokens = router.run(prompts, num_new=4, max_batch_tokens=budget)
        assert tokens[:4] == greedy
        for prompt, rows, reference_rows in zip(prompts, logits, expected, strict=True):
            torch.testing.assert_close(
                rows[: len(prompt)].double(), reference_rows, atol=LOGITS_TOLERANCE, rtol=0
            )


@pytest.mark.parametrize("variant", [{}, EVO])
def test_two_micro_batches_in_flight_over_workers_give_what_the_recurrence_gives(
    variant: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_striped_hyena(tmp_path, seed=6, **variant)
    reference = Reference(folder)
    prompts = [[1], [2, 3], list(range(40)), list(range(60, 90))]
    with (
        running_workers(folder, ["0:0,1:0", "2:0,3:0"]) as workers,
        local_router(folder, [worker.address for worker in workers]) as router,
    ):
        loaded, begin = router.loaded, router.begin_step
        assert loaded.states is not None and loaded.cache.states is not None
        scheduler = Scheduler(Limits(512, 4), loaded.blocks, states=loaded.states)
        for index, prompt in enumerate(prompts):
            scheduler.add(Sequence(str(index), list(prompt), len(prompt)))
        for _ in range(3):
            flights = []
            chunks = scheduler.schedule()
            for part in halves(chunks):
                batch = pack(part, loaded.model.layout)
                flights.append(MicroBatch(batch, torch.arange(batch.num_tokens), begin()))
            loaded.cache.states.apply(loaded.states.take_copies())
            rows = loaded.model.forward(flights, loaded.cache).split([chunk.num_tokens for chunk in chunks])
            for chunk, own in zip(chunks, rows, strict=True):
                expected = reference.logits(chunk.sequence.tokens)[chunk.start :]
                torch.testing.assert_close(own.double(), expected, atol=LOGITS_TOLERANCE, rtol=0)
                scheduler.advance(chunk)
                chunk.sequence.append(int(own[-1].argmax()))


class Forced:
    """One sequence of given tokens on the real model, its MLPs in the router: a prompt in one step, then token by token."""

    def __init__(self, folder: Path, tokens: list[int], num_prompt: int) -> None:
        loaded = load_router(router_config(folder, "router"), ReplicaPool(), PhaseClock())
        assert loaded.states is not None and loaded.cache.states is not None
        self.loaded, self.pool, self.states = loaded, loaded.states, loaded.cache.states
        self.sequence = Sequence("forced", tokens[:num_prompt], num_prompt)
        self._left = tokens[num_prompt:]
        self._scheduler = Scheduler(Limits(512, 1), loaded.blocks, states=loaded.states)
        self._scheduler.add(self.sequence)

    def step(self) -> torch.Tensor:
        """Logits of the next step's rows."""
        chunks = self._scheduler.schedule()
        batch = pack(chunks, self.loaded.model.layout)
        self.states.apply(self.pool.take_copies())
        experts = self.loaded.dispatcher.begin(whole(Epoch.of("golden", {})), deadline_s=0.0)
        part = MicroBatch(batch, torch.arange(batch.num_tokens), experts)
        logits = self.loaded.model.forward((part,), self.loaded.cache)
        self._scheduler.advance(chunks[0])
        if self._left:
            self.sequence.append(self._left.pop(0))
        return logits

    def check_states(self, expected: dict[str, torch.Tensor], moment: str, index: int) -> None:
        """Against the golden's, in the order of rows in which the router holds them."""
        assert self.sequence.state is not None
        for layer in (0, 2, 3):
            inputs, modes = (states[self.sequence.state] for states in self.states.of(layer))
            fir = expected[f"fir_state.{moment}.{layer}"][index]  # [3 D, K - 1]
            torch.testing.assert_close(inputs, by_role(fir, 4).T, atol=1e-4, rtol=1e-4)
            iir = torch.view_as_complex(expected[f"iir_state.{moment}.{layer}"][index].contiguous())
            torch.testing.assert_close(modes, iir.T, atol=1e-4, rtol=1e-4)


@pytest.mark.shared
@pytest.mark.parametrize("norm", [""])
def test_states_and_keys_after_a_prompt_and_after_single_tokens_are_those_of_the_reference(
    golden: Path, inputs: list[list[int]], expected: dict[str, torch.Tensor]
) -> None:
    for index, tokens in enumerate(inputs):
        forced = Forced(golden, tokens, num_prompt=32)
        logits = [forced.step()]
        torch.testing.assert_close(
            logits[0], expected["prefill_logits"][index], atol=LOGITS_TOLERANCE, rtol=0
        )
        forced.check_states(expected, "after_prefill", index)
        cached = torch.stack(
            forced.loaded.cache.read(
                1, Contexts(1, 2, torch.tensor(forced.sequence.blocks[:2])), slice(0, 32)
            )
        )[:, 0].permute(2, 0, 1, 3)  # [P, 2, G, d]
        keys, values = expected["kv_cache.after_prefill.1"][index].unbind(1)
        in_pairs = (
            pairs_side_by_side(keys.permute(1, 2, 0).flatten(0, 1), 12).view(2, 12, 32).permute(2, 0, 1)
        )
        torch.testing.assert_close(cached, torch.stack((in_pairs, values), 1), atol=1e-4, rtol=1e-4)
        logits = [forced.step() for _ in range(16)]
        torch.testing.assert_close(
            torch.cat(logits), expected["decode_logits"][index], atol=LOGITS_TOLERANCE, rtol=0
        )
        forced.check_states(expected, "after_decode", index)


@pytest.mark.shared
@pytest.mark.parametrize("norm", [""])
@pytest.mark.parametrize("dense_layers", ["experts", "router"])
def test_a_router_process_answers_with_the_tokens_of_the_reference_however_much_it_remembers(
    golden: Path, dense_layers: str, inputs: list[list[int]], expected: dict[str, torch.Tensor]
) -> None:
    greedy = expected["greedy_tokens"].tolist()
    shares = ["0:0,3:0", "1:0,2:0"] if dense_layers == "experts" else []
    with (
        running_workers(golden, shares) as workers,
        running_router(golden, workers, "--dense-layers", dense_layers) as router,
        SyncClient(router.address) as client,
    ):
        for _ in range(2):
            for prompt, tokens in zip(inputs, greedy, strict=True):
                answer = list(client.generate(prompt, n=3, max_tokens=12, temperature=0, ignore_eos=True))
                for index in range(3):
                    assert [t for token in answer if token.index == index for t in token.token_ids] == tokens
        stats = client.router_stats()
    # Of each prompt's 48 tokens 32 are found by all but the first of its six sequences.
    assert stats.prefix_hit_tokens == 2 * 5 * 32
