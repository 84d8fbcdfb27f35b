"""Experts that have no replica for a while: sequences that wait for them generate the tokens of an undisturbed run, and those
that do without them what transformers generates with the expert's column masked by hand."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import write_mixtral
from support.encoder_decoders import write_switch
from support.engine_events import collect
from support.hand_made import greedy, load_model
from support.striped_hyena import write_striped_hyena
from support.view_rig import ViewRig, view_rig

from moesaic.epoch import ExpertAddress
from moesaic.errors import DeadlineExceeded, Unavailable
from moesaic.expert_policy import OnMissing
from router.engine.engine import Engine
from router.engine.request import Failed, Finished, SequenceEvent, SequenceRequest, TokenGenerated
from router.engine.sampling_params import SamplingParams
from router.gating.model_view import ModelView

WAIT_S = 60.0
NUM_NEW = 12
PROMPTS = (
    [7, 8, 9, 10, 11, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52],
    [3, 4, 5],
    [60, 61, 62, 63, 30],
)
# The expert that goes in these tests.
GONE = ExpertAddress(1, 2)


def _switch(folder: Path) -> Path:
    write_switch(folder, 0)
    return folder


MODELS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "lean": (write_mixtral, {}),
    "lean, two micro-batches": (write_mixtral, {"overlap": "on"}),
    "hf": (write_mixtral, {"decoder": "hf"}),
    "striped hyena": (write_striped_hyena, {"kv_block_tokens": 4}),
    "encoder-decoder": (_switch, {}),
}


class Site:
    """An engine over a rig, and what its sequences report."""

    def __init__(self, rig: ViewRig) -> None:
        self.rig = rig
        self.engine: Engine = rig.engine()
        self.view = rig.view(rig.base)

    def submit(
        self,
        prompt: list[int],
        on_missing: OnMissing = "wait",
        *,
        view: ModelView | None = None,
        timeout_s: float = WAIT_S,
        at_token: Callable[[int], None] = lambda _: None,
        num_new: int = NUM_NEW,
        **sampling: Any,
    ) -> queue.SimpleQueue[SequenceEvent]:
        """`at_token`: called on the engine's thread with the number of tokens so far."""
        events: queue.SimpleQueue[SequenceEvent] = queue.SimpleQueue()
        seen: list[SequenceEvent] = []

        def receive(event: SequenceEvent) -> None:
            events.put(event)
            if isinstance(event, TokenGenerated):
                seen.append(event)
                at_token(len(seen))

        params = SamplingParams(**{"max_tokens": num_new, "temperature": 0.0, **sampling})
        self.engine.submit(
            SequenceRequest(
                f"{time.monotonic_ns()}",
                tuple(prompt),
                params,
                time.monotonic() + timeout_s,
                receive,
                view or self.view,
                on_missing=on_missing,
            )
        )
        return events

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline_s
            time.sleep(0.002)

    def wait_parked(self, number: int) -> None:
        self.wait_until(lambda: self.engine.stats().parked == number)


def serving(folder: Path, **engine: Any) -> Iterator[Site]:
    with view_rig(folder, **engine) as rig:
        site = Site(rig)
        site.engine.start()
        try:
            yield site
        finally:
            site.engine.stop(WAIT_S)
        assert rig.loaded.blocks.num_used == 0


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(params=["lean", "hf"])
def tiny(request: pytest.FixtureRequest, mixtral: Path) -> Iterator[Site]:
    yield from serving(mixtral, decoder=request.param)


@pytest.fixture(params=MODELS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    write, engine = MODELS[request.param]
    yield from serving(write(tmp_path), **engine)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 11}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("lost_at", [0, 4], ids=["before the prompt", "in mid-answer"])
def test_tokens_after_a_wait_are_those_of_an_undisturbed_run(
    site: Site, sampling: dict[str, Any], lost_at: int
) -> None:
    expected = [collect(site.submit(prompt, **sampling))[0] for prompt in PROMPTS]
    addresses = list(site.rig.base.versions)

    def lose(count: int) -> None:
        if count == lost_at:
            site.rig.lose(*addresses)

    if not lost_at:
        site.rig.lose(*addresses)
    events = [site.submit(prompt, at_token=lose, **sampling) for prompt in PROMPTS]
    site.wait_parked(len(PROMPTS))
    # One comes while nothing can be computed.
    late = site.submit(PROMPTS[0], **sampling)
    site.wait_parked(len(PROMPTS) + 1)
    site.rig.lose()
    assert [collect(one)[0] for one in (*events, late)] == [*expected, expected[0]]
    assert site.engine.stats().parked == 0


def test_others_run_on_while_one_waits(tiny: Site) -> None:
    others = tiny.rig.view(tiny.rig.base, deny=[f"{GONE.layer}:{GONE.slot}"])
    expected = [collect(tiny.submit(prompt, view=others))[0] for prompt in PROMPTS]
    full = [collect(tiny.submit(prompt))[0] for prompt in PROMPTS]
    tiny.rig.lose(GONE)
    waiting = [tiny.submit(prompt) for prompt in PROMPTS]
    tiny.wait_parked(len(PROMPTS))
    assert [collect(tiny.submit(prompt, view=others))[0] for prompt in PROMPTS] == expected
    assert tiny.engine.stats().parked == len(PROMPTS)
    tiny.rig.lose()
    assert [collect(one)[0] for one in waiting] == full


def test_a_sequence_that_is_to_fail_fails_at_once(tiny: Site) -> None:
    tiny.rig.lose(GONE)
    _, end = collect(tiny.submit(PROMPTS[0], "fail"))
    assert isinstance(end, Failed) and end.error.reason == "NO_REPLICA"


def test_a_deadline_that_passes_in_a_wait_names_the_cause_and_the_offset(tiny: Site) -> None:
    def lose(count: int) -> None:
        if count == 3:
            tiny.rig.lose(*tiny.rig.base.versions)

    tokens, end = collect(tiny.submit(PROMPTS[0], at_token=lose, timeout_s=3.0))
    assert len(tokens) == 3
    assert isinstance(end, Failed) and isinstance(end.error, DeadlineExceeded)
    assert end.error.message.startswith("deadline passed after 3 tokens: layer ")
    assert "has no replica left" in end.error.message


def test_a_wait_ends_after_the_time_that_is_set(mixtral: Path) -> None:
    for site in serving(mixtral, missing_wait_s=0.4):
        site.rig.lose(GONE)
        _, end = collect(site.submit(PROMPTS[0]))
        assert isinstance(end, Failed) and isinstance(end.error, Unavailable)
        assert end.error.reason == "NO_REPLICA"
        assert "for it after 0 tokens" in end.error.message


def test_a_sequence_that_waits_can_be_cancelled_paused_and_resumed(tiny: Site) -> None:
    (expected, _) = collect(tiny.submit(PROMPTS[1]))
    tiny.rig.lose(GONE)
    tiny.submit(PROMPTS[0])
    events = tiny.submit(PROMPTS[1])
    tiny.wait_parked(2)
    first, second = list(tiny.engine._live)
    tiny.engine.cancel(first)
    tiny.engine.pause(second)
    tiny.wait_parked(0)
    tiny.rig.lose()
    tiny.engine.resume(second)
    assert collect(events)[0] == expected


def masked(model: Any, on_missing: OnMissing) -> Any:
    """transformers, with the column of the expert that is gone masked, or its rank left out."""
    gate = model.model.layers[GONE.layer].mlp.gate

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight)
        if on_missing == "substitute":
            logits[:, GONE.slot] = -torch.inf
        weights, slots = logits.float().softmax(-1).topk(gate.top_k)
        weights = weights.masked_fill(slots == GONE.slot, 0)
        return logits, weights / weights.sum(-1, keepdim=True), slots

    gate.forward = forward
    return model


@pytest.mark.parametrize("on_missing", ["substitute", "renormalise"])
def test_what_stands_in_for_an_expert_computes_what_transformers_does_without_it(
    tiny: Site, mixtral: Path, on_missing: OnMissing
) -> None:
    model = masked(load_model(mixtral), on_missing)
    full = [collect(tiny.submit(prompt))[0] for prompt in PROMPTS]
    tiny.rig.lose(GONE)
    ends = []
    for prompt in PROMPTS:
        expected, _ = greedy(model, prompt, NUM_NEW)
        # What an earlier one has left in the cache would be computed by all experts.
        tokens, end = collect(tiny.submit(prompt, on_missing, prompt_logprobs=0))
        assert tokens == expected
        assert isinstance(end, Finished)
        ends.append(end)
    assert all(end.num_degraded for end in ends)
    assert tiny.engine.stats().degraded == sum(end.num_degraded for end in ends)
    # Nothing of it is left for others.
    tiny.rig.lose()
    again = [collect(tiny.submit(prompt)) for prompt in PROMPTS]
    assert [tokens for tokens, _ in again] == full
    assert not any(end.num_degraded for _, end in again if isinstance(end, Finished))


@pytest.mark.parametrize("on_missing", ["substitute", "renormalise"])
def test_degraded_values_are_not_cached(mixtral: Path, on_missing: OnMissing) -> None:
    for site in serving(mixtral, kv_block_tokens=4):
        site.rig.lose(GONE)
        collect(site.submit(PROMPTS[0], on_missing))
        hits = site.engine.stats().prefix_hit_tokens
        collect(site.submit(PROMPTS[0], on_missing))
        assert site.engine.stats().prefix_hit_tokens == hits
        site.rig.lose()
        collect(site.submit(PROMPTS[0], on_missing))
        collect(site.submit(PROMPTS[0], on_missing))
        assert site.engine.stats().prefix_hit_tokens > hits


def test_a_token_that_loses_all_its_experts_waits_whatever_stands_in_for_one(tiny: Site) -> None:
    (expected, _) = collect(tiny.submit(PROMPTS[0]))
    tiny.rig.lose(*(ExpertAddress(0, slot) for slot in range(4)))
    events = [tiny.submit(PROMPTS[0], "renormalise"), tiny.submit(PROMPTS[0], "substitute")]
    tiny.wait_parked(2)
    tiny.rig.lose()
    for one in events:
        tokens, end = collect(one)
        assert tokens == expected and isinstance(end, Finished) and end.num_degraded == 0
