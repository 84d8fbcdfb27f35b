"""The health of gates: what is measured, when, and of whom."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import random_mixtral, write_mixtral
from support.local_router import lonely_router
from support.tiny_families import random_model, write_family
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.families import describe_model, generic
from router.gating.gate_stats import STEPS_PER_SAMPLE, GateStats, z_loss

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def test_the_z_loss_is_that_of_transformers() -> None:
    logits = 5 * torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    assert float(z_loss(logits)) == pytest.approx(float(router_z_loss_func(logits[None])))


@pytest.mark.parametrize("decoder", ["lean", "hf"])
def test_every_gate_tells_the_z_loss_of_its_own_logits(tmp_path: Path, decoder: str) -> None:
    write_mixtral(tmp_path, seed=2)
    router = lonely_router(tmp_path, decoder=decoder)
    assert [gate.z_loss for gate in router.loaded.model.gate_stats.snapshot()] == [None, None]
    router.run([PROMPT])
    with torch.inference_mode():
        outputs = random_mixtral(seed=2)(torch.tensor([PROMPT]), output_router_logits=True)
    for gate, logits in zip(router.loaded.model.gate_stats.snapshot(), outputs.router_logits, strict=True):
        assert gate.z_loss == pytest.approx(float(logits.logsumexp(-1).square().mean()), rel=1e-4)
        assert (gate.assignments, gate.dropped) == (0, 0)


@pytest.mark.parametrize("family", sorted(generic.NAMES))
def test_gates_that_families_keep_are_looked_at_too(tmp_path: Path, family: str) -> None:
    write_family(tmp_path, random_model(family))
    router = lonely_router(tmp_path)
    router.run([PROMPT])
    gates = router.loaded.model.gate_stats.snapshot()
    assert gates and all(gate.z_loss is not None and gate.z_loss > 0 for gate in gates)


def test_one_step_of_many_is_looked_at_beginning_with_the_first(tmp_path: Path) -> None:
    health = GateStats.of(describe_model(open_checkpoint(write_mixtral(tmp_path))))
    looks = []
    for _ in range(2 * STEPS_PER_SAMPLE):
        health.begin_step()
        looks.append(health.sampling)
    assert [step for step, look in enumerate(looks) if look] == [0, STEPS_PER_SAMPLE]


def test_a_step_without_tokens_changes_nothing(tmp_path: Path) -> None:
    health = GateStats.of(describe_model(open_checkpoint(write_mixtral(tmp_path))))
    health.record_logits(0, torch.empty(0, 8))
    assert health.snapshot()[0].z_loss is None


def test_assignments_and_what_was_dropped_of_them_add_up(tmp_path: Path) -> None:
    health = GateStats.of(describe_model(open_checkpoint(write_mixtral(tmp_path))))
    health.record_dropped(1, num_assignments=8, num_dropped=3)
    health.record_dropped(1, num_assignments=4, num_dropped=0)
    assert [(gate.layer, gate.assignments, gate.dropped) for gate in health.snapshot()] == [
        (0, 0, 0),
        (1, 12, 3),
    ]
