"""StripedHyena under the real engine: states that are given back, taken up again, copied, and never mixed up.

The MLPs are in the router, so that nothing here needs a worker; every token is held against the reference, which goes
token by token in double precision and knows neither chunks nor states of others.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.engine_events import collect
from support.local_router import LocalRouter, router_config
from support.striped_hyena import EVO, Reference, write_striped_hyena
from support.views import plain_view, whole

from moesaic.epoch import Epoch
from moesaic.errors import DataLoss, MoesaicError, Unavailable, Unsupported
from router.assembly import load_router
from router.decoders.decoder import MicroBatch
from router.decoders.stripedhyena.decoder import rms_norm
from router.engine.engine import Engine
from router.engine.request import (
    Failed,
    PromptScored,
    SequenceEvent,
    SequenceRequest,
)
from router.engine.sampling_params import SamplingParams
from router.phase_clock import PhaseClock
from router.scheduling.admission import Admission, AdmissionLimits
from router.scheduling.block_pool import BlockPool
from router.scheduling.pace import PaceMeter
from router.scheduling.prefill_budget import PrefillBudget
from router.scheduling.prefix_cache import PrefixCache
from router.scheduling.scheduler import Limits, Scheduler
from router.scheduling.state_pool import StatePool
from router.workers.replica_pool import ReplicaPool

WAIT_S = 60.0
BLOCK = 4
MAX_RUNNING = 8
EPOCH = Epoch.of("tiny", {})


class Harness:
    """The real engine over a tiny model."""

    def __init__(
        self,
        folder: Path,
        *,
        num_blocks: int = 256,
        num_snapshots: int = 8,
        overlap: bool = False,
        max_batch_tokens: int = 64,
    ) -> None:
        config = router_config(folder, "router", kv_block_tokens=BLOCK)
        loaded = load_router(config, ReplicaPool(), PhaseClock())
        self.model = loaded.model
        self.cache = loaded.cache
        self.blocks = BlockPool(num_blocks, BLOCK)
        self.states = StatePool(MAX_RUNNING, num_snapshots)
        scheduler = Scheduler(
            Limits(max_batch_tokens, MAX_RUNNING),
            self.blocks,
            prefixes=PrefixCache(self.blocks, self.states),
            states=self.states,
        )
        self.engine = Engine(
            loaded.model,
            loaded.cache,
            scheduler,
            loaded.dispatcher,
            loaded.clock,
            overlap=overlap,
            admission=Admission(
                AdmissionLimits(MAX_RUNNING, 64),
                PaceMeter(PrefillBudget(max_batch_tokens=max_batch_tokens, max_stall=1.8)),
            ),
            missing_wait_s=WAIT_S,
        )
        self.engine.start()

    def submit(
        self, name: str, prompt: Sequence[int], *, num_new: int = 6, scored: bool = False
    ) -> queue.SimpleQueue[SequenceEvent]:
        events: queue.SimpleQueue[SequenceEvent] = queue.SimpleQueue()
        params = SamplingParams(max_tokens=num_new, temperature=0.0, prompt_logprobs=0 if scored else None)
        deadline_s = time.monotonic() + WAIT_S
        self.engine.submit(
            SequenceRequest(name, tuple(prompt), params, deadline_s, events.put, plain_view(EPOCH))
        )
        return events

    def stop(self) -> None:
        """Nothing is left behind."""
        self.engine.stop(WAIT_S)
        assert self.blocks.num_used == 0
        self.states.check_integrity([])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_striped_hyena(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture(scope="module")
def greedy(folder: Path) -> Callable[[Sequence[int], int], list[int]]:
    reference = Reference(folder)
    known: dict[tuple[int, ...], list[int]] = {}

    def generate(prompt: Sequence[int], num_new: int = 6) -> list[int]:
        key = tuple(prompt)
        if len(known.get(key, [])) < num_new:
            known[key] = reference.generate(list(prompt), num_new)
        return known[key][:num_new]

    return generate


@pytest.fixture
def make(folder: Path) -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def start(**options: object) -> Harness:
        made.append(Harness(folder, **options))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for harness in made:
        harness.stop()


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 96, (length,), generator=generator).tolist() for length in lengths]


Greedy = Callable[..., list[int]]
Make = Callable[..., Harness]


@pytest.mark.parametrize("max_batch_tokens", [64, 5])
@pytest.mark.parametrize("overlap", [False, True])
def test_prompts_of_many_lengths_at_once_each_get_what_they_get_alone(
    make: Make, greedy: Greedy, max_batch_tokens: int, overlap: bool
) -> None:
    harness = make(max_batch_tokens=max_batch_tokens, overlap=overlap)
    prompts = random_prompts(1, 2, 3, 11, 16, 17, 30)
    waiting = [harness.submit(str(index), prompt) for index, prompt in enumerate(prompts)]
    for prompt, events in zip(prompts, waiting, strict=True):
        assert collect(events)[0] == greedy(prompt)
    if overlap:
        assert harness.engine.stats().overlapped_steps > 0


def test_a_prompt_that_was_read_before_is_taken_up_where_its_state_was_kept(
    make: Make, greedy: Greedy
) -> None:
    harness = make()
    (prompt,) = random_prompts(23)
    for name in "abc":
        assert collect(harness.submit(name, prompt))[0] == greedy(prompt)
    stats = harness.engine.stats()
    assert stats.prefix_hit_tokens == 2 * 20
    assert stats.prompt_tokens == 23 + 2 * 3


def test_several_continuations_of_one_prompt_share_its_state_and_part_from_there(
    make: Make, greedy: Greedy
) -> None:
    harness = make()
    (prompt,) = random_prompts(23)
    waiting = [harness.submit(str(index), prompt) for index in range(4)]
    others = [harness.submit(f"longer {index}", [*prompt, index, 7]) for index in range(3)]
    for events in waiting:
        assert collect(events)[0] == greedy(prompt)
    for index, events in enumerate(others):
        assert collect(events)[0] == greedy([*prompt, index, 7])
    assert harness.engine.stats().prompt_tokens < 2 * 23 + 7 * 5


def test_preempted_sequences_start_over_and_are_exact(make: Make, greedy: Greedy) -> None:
    harness = make(num_blocks=8)
    prompts = random_prompts(3, 6, 5, 7)
    waiting = [harness.submit(str(index), prompt, num_new=12) for index, prompt in enumerate(prompts)]
    for prompt, events in zip(prompts, waiting, strict=True):
        assert collect(events)[0] == greedy(prompt, 12)
    assert harness.engine.stats().preemptions > 0


def test_slots_of_the_ended_are_used_again_from_zero(make: Make, greedy: Greedy) -> None:
    harness = make(num_snapshots=1)
    for index, prompt in enumerate(random_prompts(9, 2, 1, 13, 5)):
        assert collect(harness.submit(str(index), prompt, num_new=3))[0] == greedy(prompt, 3)


def test_a_prompt_is_scored_in_chunks_as_in_one(make: Make, folder: Path) -> None:
    harness = make(max_batch_tokens=5)
    (prompt,) = random_prompts(23)
    events = harness.submit("scored", prompt, num_new=0, scored=True)
    events.get(timeout=WAIT_S)
    scored = events.get(timeout=WAIT_S)
    assert isinstance(scored, PromptScored)
    expected = Reference(folder).logits(prompt).log_softmax(1)
    for place, entry in enumerate(scored.logprobs):
        assert entry.logprob == pytest.approx(float(expected[place, prompt[place + 1]]), abs=1e-4)


def test_a_sequence_that_fails_leaves_no_state_to_others(
    make: Make, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = make()
    (prompt,) = random_prompts(23)
    model = harness.model
    forward = model.forward
    lost: MoesaicError = Unavailable("layer 0: an expert worker failed")

    def lose(parts: Sequence[MicroBatch], cache: object) -> torch.Tensor:
        parts[0].experts.failed[0] = lost
        return forward(parts, harness.cache)

    for broken, error in (
        (lose, Unavailable),
        (lambda *args: forward(*args) * torch.nan, DataLoss),
    ):
        monkeypatch.setattr(model, "forward", broken)
        _, end = collect(harness.submit(f"bad {error.__name__}", prompt))
        assert isinstance(end, Failed) and isinstance(end.error, error)
        monkeypatch.undo()
    assert collect(harness.submit("good", prompt))[0] == greedy(prompt)
    assert harness.engine.stats().prefix_hit_tokens == 0


@pytest.mark.parametrize("inside_root", [True, False])
def test_either_norm_is_its_formula_and_leaves_its_input_alone(inside_root: bool) -> None:
    rows, scale = random_rows(5, 32), random_rows(1, 32)[0]
    before = rows.clone()
    wide = rows.double()
    mean = (wide**2).mean(1, keepdim=True)
    below = (mean + 0.1).sqrt() if inside_root else mean.sqrt() + 0.1
    normed = rms_norm(rows, scale, 0.1, inside_root=inside_root)
    torch.testing.assert_close(normed.double(), wide / below * scale.double())
    assert torch.equal(rows, before)


def random_rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", [{}, EVO])
def test_in_bfloat16_rounding_does_not_add_up_along_the_sequence(
    tmp_path: Path, variant: dict[str, object]
) -> None:
    write_striped_hyena(tmp_path, seed=3, dtype=torch.bfloat16, **variant)
    config = replace(router_config(tmp_path, "router"), dtype="bfloat16")
    loaded = load_router(config, ReplicaPool(), PhaseClock())
    router = LocalRouter(loaded, lambda: loaded.dispatcher.begin(whole(EPOCH), deadline_s=0.0))
    (prompt,) = random_prompts(150)
    expected = Reference(tmp_path).logits(prompt)
    for budget in (512, 1):
        ((logits,), _) = router.run([prompt], max_batch_tokens=budget)
        assert logits.dtype == torch.bfloat16
        errors = (logits.double() - expected).norm(dim=1) / expected.norm(dim=1)
        # What rounding to 8 bits costs; it does not grow along the sequence.
        assert errors.max() < 0.1 and errors[-50:].mean() < 1.5 * errors[:50].mean()


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"decoder": "hf"}, "engine.decoder"), ({"batch_invariant": True}, "engine.batch_invariant")],
)
def test_what_is_not_to_be_had_of_it_is_refused(
    folder: Path, settings: dict[str, object], field: str
) -> None:
    with pytest.raises(Unsupported) as refused:
        load_router(router_config(folder, "router", **settings), ReplicaPool(), PhaseClock())
    assert refused.value.field == field
