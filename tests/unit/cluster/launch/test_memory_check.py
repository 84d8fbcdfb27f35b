"""What `moesaic serve` says about memory before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import write_mixtral

from cluster.checkpoints.memory_fit import Memory, needs
from cluster.launch.serve import check_memory
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.errors import InvalidArgument
from moesaic.families import MoeModel, describe_model
from moesaic.settings import Settings


@pytest.fixture
def model(tmp_path: Path) -> MoeModel:
    return describe_model(open_checkpoint(write_mixtral(tmp_path)))


def checked(model: MoeModel, memory: Memory, *, has_gpu: bool = False, **values: Any) -> str | None:
    return check_memory(Settings(**values), model, memory, has_gpu=has_gpu)


def test_a_model_that_can_never_fit_is_refused_with_a_cure(model: MoeModel) -> None:
    needed = needs(model, Settings())["fp32"]
    with pytest.raises(InvalidArgument, match=r"model: needs .* in fp32 .*--dtype bf16") as refused:
        checked(model, Memory(needed - 1, needed - 1))
    assert refused.value.field == "model"


def test_a_model_that_fits_once_others_give_memory_back_gets_a_warning(model: MoeModel) -> None:
    needed = needs(model, Settings())["fp32"]
    assert checked(model, Memory(needed, needed)) is None
    warning = checked(model, Memory(needed, needed - 1))
    assert warning is not None and warning.startswith("needs ")


@pytest.mark.parametrize(
    ("values", "has_gpu"),
    [({"cluster": {"address": "10.0.0.1:6379"}}, False), ({}, True), ({"device": "cuda"}, False)],
)
def test_nothing_is_said_where_other_memory_may_hold_the_model(
    model: MoeModel, values: dict[str, Any], has_gpu: bool
) -> None:
    assert checked(model, Memory(1, 1), has_gpu=has_gpu, **values) is None


def test_a_gpu_that_is_not_used_does_not_count(model: MoeModel) -> None:
    with pytest.raises(InvalidArgument):
        checked(model, Memory(1, 1), has_gpu=True, device="cpu")
