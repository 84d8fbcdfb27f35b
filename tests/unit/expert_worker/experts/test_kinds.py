"""Every kind of expert against the module of `transformers` that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMLP
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeDenseActDense
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.phi.modeling_phi import PhiMLP
from transformers.models.phimoe.modeling_phimoe import PhimoeExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersDenseActDense,
)

from expert_worker.experts.activation import choose_activation
from expert_worker.experts.expert import ExpertForm, ExpertWeights, make_expert
from moesaic.errors import InvalidArgument
from moesaic.families.model import ACTIVATIONS, ExpertModule

HIDDEN, INNER = 48, 40
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "num_local_experts": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
}
FORM = ExpertForm(torch.device("cpu"), torch.float32)
Run = Callable[[Tensor], Tensor]


def filled(module: torch.nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return module.eval()


def of_linears(mlp: Any, up: tuple[str, ...], down: str) -> tuple[ExpertWeights, Run]:
    ways_up = [getattr(mlp, name) for name in up]
    way_down = getattr(mlp, down)
    biased = way_down.bias is not None
    weights = ExpertWeights(
        torch.cat([linear.weight for linear in ways_up]),
        way_down.weight,
        torch.cat([linear.bias for linear in ways_up]) if biased else None,
        way_down.bias,
    )
    return weights, mlp


def of_stack(experts: Any) -> tuple[ExpertWeights, Run]:
    """Slot 1 of two, which all tokens choose with weight one."""

    def run(rows: Tensor) -> Tensor:
        slots = torch.ones(len(rows), 1, dtype=torch.long)
        output: Tensor = experts(rows, slots, torch.ones(len(rows), 1))
        return output

    return ExpertWeights(experts.gate_up_proj[1], experts.down_proj[1]), run


def gated_mlp(module: type[Any], config: Any) -> tuple[ExpertWeights, Run]:
    return of_linears(filled(module(config)), ("gate_proj", "up_proj"), "down_proj")


def stack(module: type[Any], config: Any) -> tuple[ExpertWeights, Run]:
    config._experts_implementation = "eager"
    return of_stack(filled(module(config)))


def gpt_oss() -> tuple[ExpertWeights, Run]:
    """Its columns are gate and up in turn; weights as large as to reach the limit."""
    experts = filled(GptOssExperts(transformers.GptOssConfig(**SIZES, experts_implementation="eager")))
    with torch.no_grad():
        experts.gate_up_proj.mul_(20)
    _, run = of_stack(experts)

    def apart(columns: Tensor) -> Tensor:
        return torch.cat([columns[..., 0::2], columns[..., 1::2]], -1)

    weights = ExpertWeights(
        apart(experts.gate_up_proj[1]).T.contiguous(),
        experts.down_proj[1].T.contiguous(),
        apart(experts.gate_up_proj_bias[1]),
        experts.down_proj_bias[1],
    )
    return weights, run


def llama4() -> tuple[ExpertWeights, Run]:
    experts = filled(Llama4TextExperts(transformers.Llama4TextConfig(**SIZES)))
    weights = ExpertWeights(experts.gate_up_proj[1].T.contiguous(), experts.down_proj[1].T.contiguous())
    return weights, lambda rows: experts(torch.cat([rows, rows]))[len(rows) :]


def switch() -> tuple[ExpertWeights, Run]:
    config = transformers.SwitchTransformersConfig(d_model=HIDDEN, d_ff=INNER, dense_act_fn="relu")
    return of_linears(filled(SwitchTransformersDenseActDense(config)), ("wi",), "wo")


def nllb() -> tuple[ExpertWeights, Run]:
    config = transformers.NllbMoeConfig(d_model=HIDDEN, activation_function="relu")
    return of_linears(filled(NllbMoeDenseActDense(config, INNER)), ("fc1",), "fc2")


def phi() -> tuple[ExpertWeights, Run]:
    mlp = filled(PhiMLP(transformers.PhiConfig(hidden_size=HIDDEN, intermediate_size=INNER)))
    return of_linears(mlp, ("fc1",), "fc2")


SILU = ExpertModule(HIDDEN, INNER, "silu")
KINDS: dict[str, tuple[ExpertModule, Callable[[], tuple[ExpertWeights, Run]]]] = {
    "mistral": (SILU, lambda: gated_mlp(MistralMLP, transformers.MistralConfig(**SIZES))),
    "mixtral": (SILU, lambda: stack(MixtralExperts, transformers.MixtralConfig(**SIZES))),
    "olmoe": (SILU, lambda: stack(OlmoeExperts, transformers.OlmoeConfig(**SIZES))),
    "qwen2_moe": (SILU, lambda: gated_mlp(Qwen2MoeMLP, transformers.Qwen2MoeConfig(**SIZES))),
    "qwen3_moe": (SILU, lambda: stack(Qwen3MoeExperts, transformers.Qwen3MoeConfig(**SIZES))),
    "phimoe": (SILU, lambda: stack(PhimoeExperts, transformers.PhimoeConfig(**SIZES))),
    "deepseek_v3": (SILU, lambda: gated_mlp(DeepseekV3MLP, transformers.DeepseekV3Config(**SIZES))),
    "glm4_moe": (SILU, lambda: gated_mlp(Glm4MoeMLP, transformers.Glm4MoeConfig(**SIZES))),
    "llama4 dense": (SILU, lambda: gated_mlp(Llama4TextMLP, transformers.Llama4TextConfig(**SIZES))),
    "llama4": (SILU, llama4),
    "granitemoe": (SILU, lambda: stack(GraniteMoeExperts, transformers.GraniteMoeConfig(**SIZES))),
    "phi": (ExpertModule(HIDDEN, INNER, "gelu_new", gated=False, biased=True), phi),
    "switch_transformers": (ExpertModule(HIDDEN, INNER, "relu", gated=False), switch),
    "nllb_moe": (ExpertModule(HIDDEN, INNER, "relu", gated=False, biased=True), nllb),
    "gpt_oss": (ExpertModule(HIDDEN, INNER, "clamped_swiglu", biased=True, limit=7.0), gpt_oss),
}


@torch.no_grad()
@pytest.mark.parametrize(("module", "make"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_an_expert_computes_what_its_module_does(
    module: ExpertModule, make: Callable[[], tuple[ExpertWeights, Run]], batch_invariant: bool
) -> None:
    weights, run = make()
    form = ExpertForm(FORM.device, FORM.dtype, batch_invariant=batch_invariant)
    expert = make_expert(weights, module, form)
    rows = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1)) + 0.5
    expected = run(rows)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(expert(rows), expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"clamped_swiglu"}))
def test_an_activation_is_that_of_the_name(activation: str, dtype: torch.dtype) -> None:
    values = torch.linspace(-9, 9, 301).to(dtype).view(7, 43)
    expected = transformers.activations.ACT2FN[activation](values.float())
    module = ExpertModule(HIDDEN, INNER, activation, gated=False)
    for row_by_row in (False, True):
        computed = choose_activation(module, row_by_row=row_by_row)(values.clone())
        assert computed.dtype == dtype and computed.is_contiguous()
        tolerance = 2e-6 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(computed.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "module",
    [
        ExpertModule(HIDDEN, INNER, "softmax"),
        ExpertModule(HIDDEN, INNER, "clamped_swiglu"),
        ExpertModule(HIDDEN, INNER, "clamped_swiglu", gated=False, limit=7.0),
    ],
)
def test_an_activation_that_is_not_known_is_refused(module: ExpertModule) -> None:
    with pytest.raises(InvalidArgument) as caught:
        choose_activation(module)
    assert caught.value.field == "activation"
