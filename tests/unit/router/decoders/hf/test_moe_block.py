"""The blocks that take the place of those of transformers: what is asked of experts, and what is done meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.hf_steps import step_of
from torch import nn

from moesaic.errors import Unsupported
from moesaic.families.model import ExpertLayer, ExpertModule, GateRule
from router.decoders.hf.moe_block import CurrentStep, MoeBlock, RemoteExperts, RemoteMlp
from router.decoders.hf.wiring import Wiring
from router.phase_clock import PhaseClock

HIDDEN = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))


class Experts:
    """A DispatchStep whose expert of a slot adds the slot's number; it notes what happens."""

    def __init__(self, log: list[str]) -> None:
        self._log = log
        self.rows = torch.empty(0)

    def send(self, layer: int, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> Any:
        self._log.append(f"send {layer}")
        self.rows = rows
        return ((rows[:, None] + slots[..., None]) * weights[..., None]).sum(1)

    def receive(self, call: torch.Tensor) -> torch.Tensor:
        self._log.append("receive")
        return call


class FamilyBlock(nn.Module):
    """As a family has it, with a shared expert that doubles."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.shared_expert = Doubling(log)
        self.shared_expert_gate = nn.Linear(8, 1, bias=False)


class Doubling(nn.Module):
    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self._log = log

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self._log.append("shared")
        return 2 * rows


def block(rule: GateRule, wiring: Wiring, log: list[str]) -> tuple[MoeBlock, Experts]:
    layer = ExpertLayer(4, ExpertModule(8, 8, "silu"), {}, "float32", rule)
    experts = Experts(log)
    step = step_of(experts)
    made = MoeBlock(FamilyBlock(log), wiring, layer, RemoteExperts(3, step), PhaseClock())
    # All logits are equal, so that the lowest slots have equal weights.
    made.load_state_dict({f"{wiring.gate}.weight": torch.zeros(4, 8)}, strict=False, assign=True)
    return made, experts


def test_the_shared_expert_computes_while_the_others_are_awaited() -> None:
    log: list[str] = []
    made, _ = block(GateRule(2, renormalise=True), Wiring(shared="shared_expert"), log)
    output = made(HIDDEN)
    assert log == ["send 3", "shared", "receive"]
    torch.testing.assert_close(output, HIDDEN + 0.5 + 2 * HIDDEN)


def test_a_gate_of_its_own_weighs_the_shared_expert() -> None:
    wiring = Wiring(
        gate="router", shared="shared_expert", shared_gate="shared_expert_gate", returns_pair=True
    )
    made, _ = block(GateRule(2, renormalise=True), wiring, [])
    weight = torch.randn(1, 8)
    made.load_state_dict({"shared_expert_gate.weight": weight}, strict=False, assign=True)
    output, nothing = made(HIDDEN)
    assert nothing is None
    torch.testing.assert_close(output, HIDDEN + 0.5 + 2 * HIDDEN * torch.sigmoid(HIDDEN @ weight.T))


def test_where_the_weight_is_on_the_input_rows_carry_it_and_answers_count_whole() -> None:
    rule = GateRule(1, score="logit", weight="sigmoid", weighs="input")
    made, experts = block(rule, Wiring(), [])
    output = made(HIDDEN)
    torch.testing.assert_close(experts.rows, HIDDEN[0] * 0.5)
    torch.testing.assert_close(output, HIDDEN * 0.5)


def test_several_weights_cannot_go_onto_one_row() -> None:
    with pytest.raises(Unsupported, match="weigh their input"):
        block(GateRule(2, score="logit", weight="sigmoid", weighs="input"), Wiring(), [])


def test_experts_that_are_called_outside_a_step_are_an_error_that_says_so() -> None:
    with pytest.raises(RuntimeError, match="no step is running"):
        RemoteMlp(RemoteExperts(0, CurrentStep()))(HIDDEN)


def test_a_dense_layer_asks_its_one_expert_for_every_token() -> None:
    experts = Experts([])
    torch.testing.assert_close(RemoteMlp(RemoteExperts(0, step_of(experts)))(HIDDEN), HIDDEN)
    torch.testing.assert_close(experts.rows, HIDDEN[0])
