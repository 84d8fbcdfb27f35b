"""A worker that can be told to answer with NaN, and a router's calls to it."""

from __future__ import annotations

import time

import torch

from cluster.drill import injector
from cluster.drill.poisoned_worker import CURE, POISON, PoisonableCompute
from cluster.drill.quarantine import WINDOW_S, CallWatch, asked_until_s
from expert_worker.compute.call import ExpertCall


def call(hidden: torch.Tensor) -> ExpertCall:
    return ExpertCall(0, hidden, [], [], torch.zeros(0, dtype=torch.int64), None, time.monotonic() + 9)


def test_the_signals_are_those_that_a_drill_sends() -> None:
    assert (injector.POISON, injector.CURE) == (POISON, CURE)


def test_a_poisoned_worker_answers_with_nan_alone_and_a_cured_one_as_it_should(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(
        "cluster.drill.poisoned_worker.compute_calls", lambda calls: [c.hidden for c in calls]
    )
    compute = PoisonableCompute()
    hidden = torch.ones(2, 3)
    compute.poison()
    (poisoned,) = compute([call(hidden)])
    assert poisoned.shape == hidden.shape
    assert bool(poisoned.isnan().all())
    compute.cure()
    (cured,) = compute([call(hidden)])
    assert bool((cured == hidden).all())


def test_a_worker_is_asked_until_its_calls_are_few_enough_to_be_probes() -> None:
    busy = [(0.1 * step, 10 * step) for step in range(11)]
    probes = [(1.1 + 0.1 * step, 100 + step // 10) for step in range(40)]
    assert 1.0 <= asked_until_s([*busy, *probes]) <= 1.0 + WINDOW_S
    assert asked_until_s(probes) == probes[0][0]


def test_calls_after_the_cure_do_not_count() -> None:
    watch = CallWatch(0.0, [(0.0, 5), (1.0, 6), (2.0, 500)])
    assert (watch.asked_s(until_s=1.5), watch.calls(until_s=1.5)) == (0.0, 1)
    assert CallWatch(0.0).asked_s(until_s=9.0) == 0.0
