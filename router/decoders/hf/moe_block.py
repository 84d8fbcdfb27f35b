"""Replacements for the blocks of transformers whose experts are computed by workers.

Shapes: T tokens, D hidden size, E slots, K experts per token.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import nn

from moesaic.errors import Unsupported
from moesaic.families.model import ExpertLayer, GateRule
from router.decoders.capture import capture_gate_input, capture_residual
from router.decoders.decoder import MicroBatch
from router.decoders.hf.wiring import Wiring
from router.dispatch.layer_call import LayerCall
from router.gating.gate import Assignment, Gate, assign_all
from router.phase_clock import Phase, PhaseClock


class CurrentStep:
    """Holds the micro-batch that is passing the modules. All layers of a decoder share one."""

    def __init__(self) -> None:
        self._micro_batch: MicroBatch | None = None

    @property
    def micro_batch(self) -> MicroBatch:
        """Raises RuntimeError before the first step, when there is none whose experts could be called."""
        if self._micro_batch is None:
            raise RuntimeError("no step is running: the modules have no experts to call")
        return self._micro_batch

    @micro_batch.setter
    def micro_batch(self, micro_batch: MicroBatch) -> None:
        self._micro_batch = micro_batch


class RemoteExperts:
    """The experts of one layer, as the modules call them."""

    def __init__(self, layer: int, step: CurrentStep) -> None:
        self._layer = layer
        self._step = step

    def assign(self, gate: Gate, rows: torch.Tensor) -> Assignment:
        """Scores rows [T, D] with the gate of the layer, as the sequences of the micro-batch see it."""
        micro_batch = self._step.micro_batch
        capture_gate_input(micro_batch.captures, self._layer, rows)
        return gate.assign_views(self._layer, rows, micro_batch.views)

    def observe_residual(self, layer: nn.Module) -> None:
        """Lets the residual stream be read out that enters this decoder layer."""

        def capture(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            capture_residual(self._step.micro_batch.captures, self._layer, inputs[0].flatten(0, -2))

        layer.register_forward_pre_hook(capture)

    def send(self, rows: torch.Tensor, assignment: Assignment) -> LayerCall:
        """Sends rows [T, D] without waiting for the answer."""
        return self._step.micro_batch.experts.send(self._layer, rows, assignment.slots, assignment.weights)

    def receive(self, call: LayerCall) -> torch.Tensor:
        """Waits for the answer, [T, D]."""
        return self._step.micro_batch.experts.receive(call)


class GateModule(nn.Module):
    """Replaces a family's own gate module. Its parameters have the names that they have there, by which they are loaded."""

    def __init__(
        self,
        num_slots: int,
        hidden_size: int,
        rule: GateRule,
        remote: RemoteExperts,
        clock: PhaseClock,
        *,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.weight = _empty(num_slots, hidden_size)
        self.bias = _empty(num_slots) if rule.biased else None
        self.e_score_correction_bias = _empty(num_slots) if rule.selection_bias else None
        self._rule = rule
        self._remote = remote
        self._clock = clock
        self._exact = exact

    @cached_property
    def gate(self) -> Gate:
        """To be asked for once the parameters are loaded."""
        return Gate(self._rule, self.weight, self.bias, self.e_score_correction_bias, self._exact)

    def forward(self, rows: torch.Tensor) -> Assignment:
        """Scores rows [T, D]."""
        with self._clock.phase(Phase.GATE):
            return self._remote.assign(self.gate, rows)


class MoeBlock(nn.Module):
    """A gate, remote experts, and the shared expert of the family's own block, which is computed in the meantime."""

    def __init__(
        self,
        block: nn.Module,
        wiring: Wiring,
        layer: ExpertLayer,
        remote: RemoteExperts,
        clock: PhaseClock,
    ) -> None:
        """Raises Unsupported where one row would have to carry several weights."""
        super().__init__()
        assert layer.gate is not None
        if layer.gate.weighs == "input" and layer.gate.top_k > 1:
            raise Unsupported("model: experts that weigh their input take one a token", field="model")
        gate = GateModule(
            layer.num_slots, layer.module.hidden_size, layer.gate, remote, clock, exact=wiring.exact_gate
        )
        # The submodules have the family's names, by which parameters are loaded.
        self.add_module(wiring.gate, gate)
        for name in (wiring.shared, wiring.shared_gate):
            if name is not None:
                self.add_module(name, block.get_submodule(name))
        self._wiring = wiring
        self._rule = layer.gate
        self._remote = remote

    def forward(self, hidden: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, None]:
        """hidden [.., D] -> [.., D]."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        assignment: Assignment = self.get_submodule(self._wiring.gate)(rows)
        sent = rows
        if self._rule.weighs == "input":
            # Each token has one slot, so its row can carry the weight.
            sent = rows * assignment.weights.to(rows.dtype)
            assignment = Assignment(torch.ones_like(assignment.weights), assignment.slots)
        call = self._remote.send(sent, assignment)
        shared = self._compute_shared(rows)
        output = self._remote.receive(call)
        if shared is not None:
            output = output + shared
        output = output.view(hidden.shape)
        return (output, None) if self._wiring.returns_pair else output

    def _compute_shared(self, rows: torch.Tensor) -> torch.Tensor | None:
        if self._wiring.shared is None:
            return None
        shared: torch.Tensor = self.get_submodule(self._wiring.shared)(rows)
        if self._wiring.shared_gate is None:
            return shared
        weights: torch.Tensor = self.get_submodule(self._wiring.shared_gate)(rows)
        return shared * weights.sigmoid()


class RemoteMlp(nn.Module):
    """Replaces the MLP of a dense layer: the layer's one expert computes it."""

    def __init__(self, remote: RemoteExperts) -> None:
        super().__init__()
        self._remote = remote

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [.., D] -> [.., D]."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        output = self._remote.receive(self._remote.send(rows, assign_all(rows)))
        return output.view(hidden.shape)


def _empty(*shape: int) -> nn.Parameter:
    """A parameter without memory, to be replaced by the one that is read."""
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
