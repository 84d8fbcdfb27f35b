"""What a model takes in each form, and what is said of a machine that has too little memory for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from support.sparse_checkpoints import MIXTRAL_8X7B, TINY_MISTRAL, write_sparse_decoder

from cluster.checkpoints.memory_fit import Memory, chosen_form, fit_model, needs
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.families import MoeModel, describe_model
from moesaic.settings import Settings

GB = 1_000_000_000
PARAMETERS, IN_EXPERTS = 46_702_792_704, 45_097_156_608
REST = PARAMETERS - IN_EXPERTS


@cache
def mixtral() -> MoeModel:
    with TemporaryDirectory() as folder:
        return describe_model(open_checkpoint(write_sparse_decoder(Path(folder), MIXTRAL_8X7B)))


def settings(**values: Any) -> Settings:
    return Settings(**values)


def test_the_published_mixtral_needs_what_its_parameters_take() -> None:
    needed = needs(mixtral(), settings())
    assert needed["fp32"] == 4 * PARAMETERS
    assert needed["bf16"] == 2 * PARAMETERS
    # One float32 for each output of gate, up and down.
    assert needed["int8"] == 4 * REST + IN_EXPERTS + 4 * 256 * (2 * 14336 + 4096)
    # Half a byte, and a scale and a zero in bf16 for 32 weights.
    assert needed["int4"] == 4 * REST + IN_EXPERTS // 2 + IN_EXPERTS // 8


def test_copies_of_experts_and_of_the_rest_are_counted() -> None:
    once = needs(mixtral(), settings())["bf16"]
    cluster = {"replicas": 2, "routers": 3}
    assert needs(mixtral(), settings(cluster=cluster))["bf16"] == once + 2 * (IN_EXPERTS + 2 * REST)


def test_the_rest_is_in_bf16_where_the_settings_say_so() -> None:
    assert needs(mixtral(), settings(dtype="bf16"))["int8"] == needs(mixtral(), settings())["int8"] - 2 * REST


def test_a_small_model_is_counted_in_megabytes(tmp_path: Path) -> None:
    model = describe_model(open_checkpoint(write_sparse_decoder(tmp_path, TINY_MISTRAL)))
    assert " MB in fp32 (" in fit_model(model, settings(), Memory(24 * GB, 20 * GB)).sentence


def test_a_form_that_the_sizes_do_not_allow_is_left_out(tmp_path: Path) -> None:
    model = describe_model(
        open_checkpoint(write_sparse_decoder(tmp_path, {**TINY_MISTRAL, "intermediate_size": 24}))
    )
    assert "int4" not in needs(model, settings())
    fit = fit_model(model, settings(worker={"expert_dtype": "int4"}), Memory(GB, GB))
    assert fit.sentence == "experts of these sizes cannot be held in int4"


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ({}, "fp32"),
        ({"dtype": "bf16"}, "bf16"),
        ({"worker": {"expert_dtype": "int8"}}, "int8"),
        ({"dtype": "bf16", "worker": {"expert_dtype": "int4"}}, "int4"),
    ],
)
def test_the_form_of_the_experts_is_that_of_a_cpu(values: dict[str, Any], form: str) -> None:
    assert chosen_form(settings(**values)) == form


@pytest.mark.parametrize(
    ("limit", "free", "fits", "cure"),
    [
        (24, 20, ["no", "no", "no", "no"], "24 GB: --workers on more nodes"),
        (48, 40, ["no", "no", "no", "fits"], "48 GB: --expert-dtype int4, or --workers on more nodes"),
        (64, 60, ["no", "no", "fits", "fits"], "64 GB: --expert-dtype int8, or --workers on more nodes"),
        (200, 100, ["tight", "fits", "fits", "fits"], "200 GB, 100 GB of it free: --dtype bf16, or --workers on more nodes"),
        (256, 250, ["fits"] * 4, "256 GB, 250 GB of it free"),
    ],
)  # fmt: skip
def test_what_is_said_names_what_is_needed_what_there_is_and_a_cure(
    limit: int, free: int, fits: list[str], cure: str
) -> None:
    fit = fit_model(mixtral(), settings(), Memory(limit * GB, free * GB))
    assert list(fit.fits.values()) == fits
    assert fit.sentence == f"needs 187 GB in fp32 (93 bf16, 52 int8, 35 int4), this machine has {cure}"
