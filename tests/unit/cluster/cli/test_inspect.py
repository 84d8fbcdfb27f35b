"""What `moesaic inspect` finds out about a folder, and what a person reads."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import write_mixtral
from support.mistral_tokenizers import write_sentencepiece
from support.sparse_checkpoints import MIXTRAL_8X7B, TINY_MISTRAL, write_sparse_decoder
from support.tiny_families import random_model, write_family
from support.tiny_tokenizer import byte_level, write_folder
from typer.testing import CliRunner

from cluster.checkpoints.inspection import inspect_folder
from cluster.checkpoints.model_facts import HELD, Held, expert_bytes
from cluster.checkpoints.model_source import DEMO_MODEL
from cluster.cli.commands import app
from cluster.cli.inspect import _ranges
from cluster.terminal.tables import amount
from moesaic.compute.linear import Linear
from moesaic.families.model import ExpertModule

# What reading all headers and small files may come to, for a file of 87 GiB.
MAX_READ_BYTES = 4 << 20
FORMS: dict[Held, tuple[torch.dtype, str]] = {
    "fp32": (torch.float32, "float"),
    "bf16": (torch.bfloat16, "float"),
    "int8": (torch.float32, "int8"),
    "int4": (torch.float32, "int4"),
}
# From the goldens' README: the layout, and a word on the layers.
GOLDENS = {
    "mixtral/hf_v4": ("Hugging Face, every expert by itself", "8, 2 a token"),
    "mixtral/hf_v5_fused": ("Hugging Face, all experts of a layer in one tensor", "8, 2 a token"),
    "mixtral/mistral_native": ("Mistral's own, every expert by itself", "8, 2 a token"),
    "mistral-sliding-window/mistral_native": ("Mistral's own", "window 8"),
    "mistral-dense/checkpoint": ("Hugging Face", "dense, one expert"),
    "deepseek-v3/checkpoint": ("Hugging Face, every expert by itself", "16, 4 a token, 2.30 K shared"),
    "gpt-oss/checkpoint": ("Hugging Face, all experts of a layer in one tensor", "window 8, sinks"),
    "stripedhyena/checkpoint": ("Hugging Face", "hyena, 2 modes"),
}


def inspect(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, ["inspect", *arguments], env={"COLUMNS": "80"})
    assert result.exit_code == exit_code, result.output
    assert result.stderr == ""
    assert "--json" in arguments or max(map(len, result.stdout.splitlines())) <= 80
    return result.stdout


def report_of(*arguments: str, exit_code: int = 0) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(inspect(*arguments, "--json", exit_code=exit_code))
    return report


def line(text: str, name: str) -> list[str]:
    return next(line.removeprefix(name) for line in text.splitlines() if line.startswith(name)).split()


def bytes_read() -> int:
    """By this process so far, from whatever file."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def test_the_demo_model_is_what_is_inspected_by_default() -> None:
    text = inspect()
    assert line(text, "will serve") == ["yes"]
    assert line(text, "parameters") == ["11.5", "M,", "of", "which", "a", "token", "meets", "5.06", "M"]
    assert line(text, "chat template") == ["chat_template.jinja"]
    assert line(text, "each of 2 workers") == ["16", "16.5", "MiB", "8.2", "MiB", "4.2", "MiB", "2.6", "MiB"]


@pytest.mark.timeout(300)
def test_a_folder_of_87_gib_is_inspected_by_its_headers_alone(tmp_path: Path) -> None:
    folder = write_sparse_decoder(tmp_path / "mixtral", MIXTRAL_8X7B)
    before = bytes_read()
    inspection = inspect_folder(folder)
    assert bytes_read() - before < MAX_READ_BYTES
    assert inspection.serves and inspection.model is not None and inspection.stored is not None
    assert inspection.stored.bytes == {"BF16": 93_405_585_408}
    model = inspection.model
    # The figures that Mistral published.
    assert (model.parameters, model.active_parameters) == (46_702_792_704, 12_879_925_248)
    assert model.expert_file_bytes + model.router_file_bytes == 93_405_585_408
    assert [(memory.workers, memory.experts) for memory in model.worker_memory] == [
        (1, 256),
        (2, 128),
        (4, 64),
        (8, 32),
    ]
    assert model.worker_memory[2].bytes["bf16"] == model.expert_file_bytes // 4


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("biased", [False, True])
def test_the_bytes_of_an_expert_are_those_that_a_worker_holds(held: Held, biased: bool) -> None:
    module = ExpertModule(hidden_size=64, inner_size=96, activation="silu", biased=biased)
    dtype, form = FORMS[held]
    biases = [torch.ones(module.shape(f"{name}_bias")) for name in ("gate", "up", "down")]
    weights = [torch.ones(module.shape(name), dtype=dtype) for name in ("gate", "up", "down")]
    products = [
        Linear(weight, form, bias.to(dtype) if biased else None)  # type: ignore[arg-type]
        for weight, bias in zip(weights, biases, strict=True)
    ]
    assert expert_bytes(module, held) == sum(product.num_bytes for product in products)


def test_dense_layers_are_an_expert_each_or_none(tmp_path: Path) -> None:
    folder = write_sparse_decoder(tmp_path / "dense", TINY_MISTRAL)
    assert "dense, one expert" in inspect(str(folder))
    in_router = inspect(str(folder), "--dense-layers", "router")
    assert "dense, in the router" in in_router
    assert "worker" not in in_router
    report = report_of(str(folder), "--dense-layers", "router")
    assert (report["model"]["experts"], report["model"]["worker_memory"]) == (0, [])


def test_a_head_of_its_own_is_told_where_the_config_ties_it(tmp_path: Path) -> None:
    folder = write_mixtral(tmp_path / "tiny", tie_word_embeddings=True)
    assert "not tied" not in inspect(str(folder))
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding + 1}, folder / "model.safetensors")
    assert line(inspect(str(folder)), "not tied")[0] == "lm_head.weight:"
    tied = report_of(str(write_mixtral(tmp_path / "tied", tie_word_embeddings=True)))["model"]
    own = report_of(str(folder))["model"]
    assert own["untied"] == ["lm_head.weight"]
    assert own["parameters"] == tied["parameters"] + embedding.numel()
    assert own["router_file_bytes"] == tied["router_file_bytes"] + embedding.nbytes


def test_the_json_has_all_values_as_they_are(tmp_path: Path) -> None:
    report = report_of(str(write_mixtral(tmp_path / "tiny")))
    assert (report["serves"], report["problem"], report["family"]) == (True, None, "mixtral")
    assert (report["tokenizer"], report["chat_template"]) == (None, None)
    assert report["model"]["layers"] == [
        {
            "layers": [0, 1],
            "mixer": "attention, 4/2 heads",
            "gated": True,
            "experts": 4,
            "top_k": 2,
            "inner_size": 24,
            "parameters": 3 * 32 * 24,
            "shared_parameters": 0,
        }
    ]


def test_a_folder_that_will_not_serve_says_why_and_what_is_known_all_the_same(tmp_path: Path) -> None:
    folder = write_sparse_decoder(tmp_path / "other", TINY_MISTRAL)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 16}))
    report = report_of(str(folder), exit_code=2)
    assert (report["serves"], report["family"], report["model"]) == (False, "mistral", None)
    assert report["problem"]["field"] == "config.json: hidden_size"
    assert report["problem"]["message"] in " ".join(inspect(str(folder), exit_code=2).split())


def test_a_folder_of_pickles_names_the_command_that_converts_it(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").write_bytes(b"never read")
    text = inspect(str(tmp_path), exit_code=2)
    assert "moesaic convert FOLDER OUT" in " ".join(text.split())
    assert line(text, "layout") == ["pickles"]


@pytest.mark.parametrize(
    ("file", "content", "field"),
    [
        ("tokenizer.json", '{"version": "1.0"', "tokenizer.json"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json"),
        ("tokenizer_config.json", '{"chat_template": 5}', "tokenizer_config.json"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id"),
        ("generation_config.json", '{"temperature": -1}', "temperature"),
        ("chat_template.jinja", "{% if %}", "chat_template"),
    ],
)
def test_what_a_router_would_refuse_when_it_loads_the_text_is_a_reason(
    tmp_path: Path, file: str, content: str, field: str
) -> None:
    folder = write_folder(write_sparse_decoder(tmp_path / "dense", TINY_MISTRAL), byte_level())
    assert report_of(str(folder))["chat_template"] == "tokenizer_config.json"
    (folder / file).write_text(content)
    report = report_of(str(folder), exit_code=2)
    assert (report["problem"]["field"], report["model"]["vocab_size"] > 0) == (field, True)


def test_what_nobody_reads_is_no_reason(tmp_path: Path) -> None:
    folder = write_sparse_decoder(tmp_path / "dense", TINY_MISTRAL)
    (folder / "generation_config.json").write_text('{"temperature": -1}')
    assert report_of(str(folder), "--generation-config", "none")["serves"]


def test_the_newest_tokenizer_file_is_named_and_its_chat_format(tmp_path: Path) -> None:
    folder = write_sparse_decoder(tmp_path / "dense", TINY_MISTRAL)
    for name in ("tokenizer.model", "tokenizer.model.v2", "tokenizer.model.v3"):
        write_sentencepiece(folder, name)
    report = report_of(str(folder))
    assert report["tokenizer"] == "tokenizer.model.v3"
    assert report["chat_template"] == ("Mistral's own format" if find_spec("mistral_common") else None)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert report_of(str(folder))["chat_template"] == "chat_template.jinja"


def test_no_folder_is_an_error_like_that_of_other_verbs() -> None:
    result = CliRunner().invoke(app, ["inspect", "/no/such/folder"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: model '/no/such/folder': no such folder\n"


@pytest.mark.parametrize("golden", GOLDENS)
def test_every_layout_of_the_reference_data_is_recognised(shared: Path, golden: str) -> None:
    layout, says = GOLDENS[golden]
    text = inspect(str(shared / "goldens" / golden))
    assert " ".join(line(text, "layout")) == layout
    assert says in text


def test_inspecting_imports_no_ray() -> None:
    code = (
        "import sys; from cluster.checkpoints.inspection import inspect_folder;"
        f"assert inspect_folder(__import__('pathlib').Path({str(DEMO_MODEL)!r})).serves;"
        "print({'ray', 'fastapi'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0,), "0"),
        ((0, 1), "0-1"),
        ((0, 2), "0, 2"),
        ((0, 2, 4, 6), "0-6/2"),
        ((0, 2, 3, 4, 9), "0, 2-4, 9"),
    ],
)
def test_layers_are_named_in_few_characters(numbers: tuple[int, ...], text: str) -> None:
    assert _ranges(numbers) == text


def test_large_numbers_have_three_digits() -> None:
    numbers = (7, 999, 1000, 46_702_792_704, 671_026_419_200, 999_600, 12_345)
    assert [amount(number) for number in numbers] == [
        "7",
        "999",
        "1.00 K",
        "46.7 B",
        "671 B",
        "1.00 M",
        "12.3 K",
    ]


def test_end_tokens_that_a_router_would_refuse_are_a_reason(tmp_path: Path) -> None:
    folder = write_mixtral(tmp_path / "tiny")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    assert report_of(str(folder), exit_code=2)["problem"]["field"] == "eos_token_id"


def test_a_head_of_another_size_is_a_reason_in_every_family(tmp_path: Path) -> None:
    folder = write_family(tmp_path, random_model("minimax_m2"))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(95, 32)}, folder / "model.safetensors")
    assert report_of(str(folder), exit_code=2)["problem"]["field"] == "config.json: vocab_size"
