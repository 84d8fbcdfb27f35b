"""`moesaic convert`: every form that models of pickles come in, to the bits of the Hugging Face form, or a clear refusal."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from support.checkpoints import TINY_MIXTRAL
from support.mistral_checkpoints import mistral_tensors, randomise, write_mistral_format
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from cluster.checkpoints.conversion import Conversion, convert
from cluster.checkpoints.conversion_folder import MARK_FILE
from cluster.cli.commands import app
from cluster.terminal.convert_progress import ConvertProgress, Progressed
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.errors import CheckpointError, InvalidArgument, MoesaicError
from moesaic.families import describe_model

SHARD_BYTES = 30_000
TINY_MISTRAL = {key: value for key, value in TINY_MIXTRAL.items() if "expert" not in key}


def mixtral(**overrides: Any) -> PreTrainedModel:
    return randomise(MixtralForCausalLM(MixtralConfig(**TINY_MIXTRAL | overrides)))


def mistral(**overrides: Any) -> PreTrainedModel:
    return randomise(MistralForCausalLM(MistralConfig(**TINY_MISTRAL | overrides)))


def run(folder: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> Conversion:
    return convert(folder, out, max_shard_bytes=shard_bytes, show=lambda _: None)


def refusal(folder: Path, out: Path) -> MoesaicError:
    with pytest.raises((CheckpointError, InvalidArgument)) as caught:
        run(folder, out)
    assert str(out) not in caught.value.message and "\n" not in caught.value.message
    return caught.value


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Copies: what `load_file` gives is a view of the file."""
    return {k: v.clone() for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


def write_bins(folder: Path, model: PreTrainedModel, num_files: int = 2) -> Path:
    """A Hugging Face folder as they were before safetensors."""
    model.save_pretrained(folder)
    stored = tensors(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    if num_files == 1:
        torch.save(stored, folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for part in range(num_files):
        file = f"pytorch_model-{part + 1:05}-of-{num_files:05}.bin"
        names = sorted(stored)[part::num_files]
        torch.save({name: stored[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def torrent(tmp_path: Path) -> Path:
    return write_mistral_format(tmp_path / "torrent", mixtral(), "torrent")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize("form", ["torrent", "stacked"])
@pytest.mark.parametrize(
    "overrides", [{}, {"num_key_value_heads": 1}, {"head_dim": 20}, {"num_local_experts": 3}], ids=str
)
def test_a_mixtral_of_pickles_becomes_the_published_folder_bit_by_bit(
    tmp_path: Path, out: Path, form: Any, overrides: dict[str, int]
) -> None:
    model = mixtral(**overrides)
    model.save_pretrained(tmp_path / "hf")
    run(write_mistral_format(tmp_path / form, model, form), out)
    assert_same(tensors(out), tensors(tmp_path / "hf"))


@pytest.mark.parametrize("overrides", [{}, {"sliding_window": 16, "head_dim": 12}], ids=str)
def test_a_dense_mistral_of_pickles_becomes_the_published_folder(
    tmp_path: Path, out: Path, overrides: dict[str, int]
) -> None:
    model = mistral(**overrides)
    model.save_pretrained(tmp_path / "hf")
    done = run(write_mistral_format(tmp_path / "native", model, "torrent"), out)
    assert_same(tensors(out), tensors(tmp_path / "hf"))
    assert done.family == "mistral"
    written = describe_model(open_checkpoint(out))
    assert written.mixers == describe_model(open_checkpoint(tmp_path / "hf")).mixers


def test_transformers_loads_what_was_written_and_computes_the_same(tmp_path: Path, out: Path) -> None:
    model = mixtral()
    run(write_mistral_format(tmp_path / "native", model, "stacked"), out)
    loaded = MixtralForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    token_ids = torch.arange(12).view(1, -1)
    with torch.inference_mode():
        assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)


def test_what_was_done_is_told(torrent: Path, out: Path) -> None:
    done = run(torrent, out)
    model = describe_model(open_checkpoint(out))
    assert (done.family, done.dtype, done.kept_shards) == ("mixtral", "float32", 0)
    assert (done.parameters, done.active_parameters) == (model.num_parameters, model.num_active_parameters)
    assert done.bytes == 4 * model.num_parameters
    assert done.shards == len(list(out.glob("*.safetensors"))) > 1
    assert done.tensors == len(open_checkpoint(out).tensors)


def test_files_are_no_larger_than_asked_but_hold_one_tensor_at_least(torrent: Path, out: Path) -> None:
    run(torrent, out, shard_bytes=7000)
    held = [tensors_of(file) for file in out.glob("*.safetensors")]
    assert all(len(names) == 1 or sum(names.values()) <= 7000 for names in held)
    assert max(sum(names.values()) for names in held) > 7000


def tensors_of(file: Path) -> dict[str, int]:
    return {name: tensor.nbytes for name, tensor in load_file(file).items()}


def test_one_file_is_enough_for_a_small_model_and_says_that_it_is_of_torch(torrent: Path, out: Path) -> None:
    run(torrent, out, shard_bytes=1 << 30)
    assert {path.name for path in out.iterdir()} == {
        *("model.safetensors", "config.json", "params.json", MARK_FILE)
    }
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_a_hugging_face_folder_of_pickles_keeps_names_bits_and_config(
    tmp_path: Path, out: Path, num_files: int, tied: bool
) -> None:
    model = mistral(sliding_window=None, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "hf")
    run(write_bins(tmp_path / "bins", model, num_files), out)
    assert_same(tensors(out), tensors(tmp_path / "hf"))
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (tmp_path / "bins" / "config.json").read_text()
    )


def test_half_precision_is_kept(tmp_path: Path, out: Path) -> None:
    model = mixtral().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    run(write_mistral_format(tmp_path / "native", model, "stacked"), out)
    assert_same(tensors(out), tensors(tmp_path / "hf"))
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_tokenizer_and_its_like_come_along_and_nothing_else(torrent: Path, out: Path) -> None:
    companions = ("tokenizer.model", "tokenizer.model.v3", "mistral_instruct_240323.model.v3", "tokenizer.json", "tokenizer_config.json",
                  "chat_template.jinja", "generation_config.json")  # fmt: skip
    for name in (*companions, "RELEASE", "modeling.py", "notes.txt"):
        (torrent / name).write_text(name)
    run(torrent, out, shard_bytes=1 << 30)
    assert {path.name for path in out.iterdir()} == {
        *companions, "params.json", "model.safetensors", "config.json", MARK_FILE,
    }  # fmt: skip
    assert (out / "tokenizer.model").read_text() == "tokenizer.model"


# StripedHyena


@pytest.mark.shared
@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("config_file", ["config.json", "7b.yml"])
def test_a_striped_hyena_gets_the_names_of_the_hub(
    shared: Path, tmp_path: Path, out: Path, prefixed: bool, config_file: str
) -> None:
    golden = shared / "goldens" / "stripedhyena" / "checkpoint"
    stored, config = tensors(golden), json.loads((golden / "config.json").read_text())
    folder = tmp_path / "hyena"
    folder.mkdir()
    bare = {name if prefixed else name.removeprefix("backbone."): tensor for name, tensor in stored.items()}
    torch.save(bare | {"norm._extra_state": None}, folder / "pytorch-model.bin")
    if config_file == "config.json":
        (folder / config_file).write_text(json.dumps(config))
    else:
        kept = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
        # As people write it, and as YAML takes for text.
        text = yaml.safe_dump(kept | {"eps": "EPS"}).replace("EPS", "1e-3")
        (folder / config_file).write_text(text)
    done = run(folder, out)
    assert done.family == "stripedhyena"
    assert_same(tensors(out), stored)
    assert json.loads((out / "config.json").read_text())["eps"] == 1e-3


@pytest.mark.parametrize(
    "text",
    [
        *("a: [", "- 1", "name: other", "when: 2024-01-01\nhyena_layer_idxs: [0]"),
        # A small file that stands for more than any memory holds.
        "a: &a [1]\n" + "".join(f"b{i}: &a [*a, *a]\n" for i in range(99)) + "hyena_layer_idxs: [0]",
    ],
)
def test_a_yaml_that_is_no_config_of_a_striped_hyena_is_refused(tmp_path: Path, out: Path, text: str) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.bin")
    (tmp_path / "config.yml").write_text(text)
    assert refusal(tmp_path, out).field == "config.yml"


# What cannot be converted


def test_a_pickle_that_holds_more_than_tensors_is_refused_and_not_run(tmp_path: Path, out: Path) -> None:
    torch.save({"a": _Bomb(tmp_path / "went_off")}, tmp_path / "consolidated.00.pth")
    write_params(tmp_path)
    error = refusal(tmp_path, out)
    assert error.field == "consolidated.00.pth"
    assert not (tmp_path / "went_off").exists() and not out.exists()


class _Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def write_params(folder: Path) -> None:
    write_mistral_format(folder / "other", mixtral(), "torrent")
    shutil.move(folder / "other" / "params.json", folder / "params.json")
    shutil.rmtree(folder / "other")


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], {"a": {"b": torch.zeros(2)}}, {"a": 1}, {1: torch.zeros(2)}], ids=str
)
def test_a_pickle_of_another_structure_is_refused(tmp_path: Path, out: Path, content: object) -> None:
    torch.save(content, tmp_path / "consolidated.00.pth")
    write_params(tmp_path)
    assert refusal(tmp_path, out).field == "consolidated.00.pth"


def test_a_pickle_of_an_old_torch_is_refused(tmp_path: Path, out: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    write_params(tmp_path)
    assert "torch before 1.6" in refusal(tmp_path, out).message


@pytest.mark.parametrize("keep", [0, 10, 4000, -1])
def test_a_cut_pickle_is_refused(torrent: Path, out: Path, keep: int) -> None:
    file = torrent / "consolidated.00.pth"
    file.write_bytes(file.read_bytes()[:keep])
    assert refusal(torrent, out).field == "consolidated.00.pth"


@pytest.mark.parametrize(("where", "byte"), [(b"PK\x01\x02", 6), (b"/data.pkl", 0)], ids=["version", "name"])
def test_a_pickle_whose_directory_is_damaged_is_refused(
    torrent: Path, out: Path, where: bytes, byte: int
) -> None:
    file = torrent / "consolidated.00.pth"
    content = bytearray(file.read_bytes())
    content[content.rindex(where) + byte] = 0xFF
    file.write_bytes(content)
    assert refusal(torrent, out).field == "consolidated.00.pth"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("consolidated.safetensors", "safetensors already"),
        ("consolidated.01.pt", "two forms"),
        ("pytorch_model.bin", "two forms"),
    ],
)
def test_a_folder_of_two_forms_is_refused(torrent: Path, out: Path, name: str, says: str) -> None:
    (torrent / name).write_bytes(b"")
    error = refusal(torrent, out)
    assert error.field == "model"
    assert says in error.message and name in error.message


def test_a_folder_without_weights_is_refused(tmp_path: Path, out: Path) -> None:
    assert "nothing to convert" in refusal(tmp_path, out).message
    assert "no such folder" in refusal(tmp_path / "nowhere", out).message


def test_a_folder_without_its_config_is_refused(torrent: Path, out: Path) -> None:
    (torrent / "params.json").unlink()
    assert "params.json" in refusal(torrent, out).message


def test_a_model_cut_over_files_within_its_tensors_is_refused(torrent: Path, out: Path) -> None:
    shutil.copy(torrent / "consolidated.00.pth", torrent / "consolidated.01.pth")
    error = refusal(torrent, out)
    assert error.field == "consolidated.01.pth"
    assert "split tensors" in error.message


def test_a_missing_tensor_is_named_before_anything_is_written(tmp_path: Path, out: Path) -> None:
    folder = write_mistral_format(tmp_path / "native", mixtral(), "torrent")
    stored = mistral_tensors(mixtral())
    del stored["layers.1.feed_forward.experts.2.w2.weight"]
    torch.save(stored, folder / "consolidated.00.pth")
    assert refusal(folder, out).field == "layers.1.feed_forward.experts.2.w2.weight"
    assert not out.exists()


def test_stacked_experts_of_another_number_are_refused(tmp_path: Path, out: Path) -> None:
    folder = write_mistral_format(tmp_path / "native", mixtral(), "stacked", num_local_experts=5)
    assert refusal(folder, out).field in {
        f"layers.{layer}.block_sparse_moe.w{n}" for layer in (0, 1) for n in (1, 2, 3)
    }
    folder = write_mistral_format(tmp_path / "native", mixtral(), "stacked", num_local_experts=2)
    assert refusal(folder, out).field == "params.json: num_local_experts"


def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, out: Path) -> None:
    folder = write_bins(tmp_path / "bins", mistral())
    for file in ("../a.bin", "/etc/a.bin", "a.safetensor", 7):
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
        assert refusal(folder, out).field == "pytorch_model.bin.index.json"


def test_a_shard_that_its_index_names_and_is_not_there_is_refused(tmp_path: Path, out: Path) -> None:
    folder = write_bins(tmp_path / "bins", mistral())
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    error = refusal(folder, out)
    assert error.field == "pytorch_model-00002-of-00002.bin" and "missing" in error.message


def test_a_tensor_that_the_index_names_and_no_shard_has_is_refused(tmp_path: Path, out: Path) -> None:
    folder = write_bins(tmp_path / "bins", mistral())
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    index["weight_map"]["more"] = "pytorch_model-00001-of-00002.bin"
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "'more' is missing" in refusal(folder, out).message


def test_several_bins_without_an_index_are_refused(tmp_path: Path, out: Path) -> None:
    folder = write_bins(tmp_path / "bins", mistral())
    (folder / "pytorch_model.bin.index.json").unlink()
    assert "no pytorch_model.bin.index.json" in refusal(folder, out).message


# The folder that is written


def interrupted(folder: Path, out: Path, after: Callable[[Progressed], bool]) -> None:
    """Stops a conversion in the middle of a file, as a full disk or a lost machine would."""

    def tell(progress: Progressed) -> None:
        if after(progress):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, out, max_shard_bytes=SHARD_BYTES, show=tell)


def test_a_conversion_that_was_stopped_goes_on_with_the_files_that_are_whole(
    tmp_path: Path, torrent: Path, out: Path
) -> None:
    interrupted(torrent, out, lambda progress: progress.done_files == 2)
    assert not (out / "config.json").exists()
    whole = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert len(whole) == 2 and len(list(out.glob("*.part"))) == 1
    done = run(torrent, out)
    assert done.kept_shards == 2
    assert {name: (out / name).stat().st_mtime_ns for name in whole} == whole
    assert not list(out.glob("*.part"))
    mixtral().save_pretrained(tmp_path / "hf")
    assert_same(tensors(out), tensors(tmp_path / "hf"))


def test_a_file_that_is_not_what_was_planned_is_written_again(torrent: Path, out: Path) -> None:
    run(torrent, out)
    first, second, *_ = sorted(out.glob("*.safetensors"))
    expected = tensors(out)
    first.write_bytes(first.read_bytes()[:-1])
    shutil.copy(sorted(out.glob("*.safetensors"))[2], second)
    assert run(torrent, out).kept_shards == run(torrent, out).shards - 2
    assert_same(tensors(out), expected)


def test_a_finished_conversion_stays_as_it_is(torrent: Path, out: Path) -> None:
    done = run(torrent, out)
    again = run(torrent, out)
    assert again.kept_shards == again.shards == done.shards


def test_a_folder_made_from_another_source_is_refused(tmp_path: Path, torrent: Path, out: Path) -> None:
    run(torrent, out)
    other = write_mistral_format(tmp_path / "other", randomise(mixtral(), seed=1), "torrent")
    error = refusal(other, out)
    assert error.field == "out" and "another model" in error.message


def test_a_folder_with_files_of_another_size_is_refused(torrent: Path, out: Path) -> None:
    run(torrent, out)
    with pytest.raises(InvalidArgument, match="another size"):
        run(torrent, out, shard_bytes=SHARD_BYTES + 1)


def test_a_folder_that_has_other_files_is_refused_and_left_alone(torrent: Path, out: Path) -> None:
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert "not empty" in refusal(torrent, out).message
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    assert "not empty" in refusal(torrent, torrent).message


def test_a_file_that_came_into_a_conversion_is_told(torrent: Path, out: Path) -> None:
    run(torrent, out)
    (out / "precious.txt").write_text("mine")
    assert "'precious.txt'" in refusal(torrent, out).message


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    torrent: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(torrent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    error = refusal(torrent, out)
    assert error.field == "out" and "1.0 MiB are free" in error.message
    assert not list(out.glob("*.safetensors*"))


def test_a_second_conversion_into_the_same_folder_waits_for_nobody(torrent: Path, out: Path) -> None:
    def tell(_: Progressed) -> None:
        assert "another conversion" in refusal(torrent, out).message

    convert(torrent, out, max_shard_bytes=1 << 30, show=tell)


def test_a_place_that_cannot_be_written_is_told(torrent: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refusal(torrent, tmp_path / "file").field == "out"


# The verb


def test_the_verb_says_what_the_new_folder_is(torrent: Path, out: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(torrent), str(out)])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("mixtral: ") and str(out) in result.stdout
    assert result.stderr.splitlines() == ["converting: 0 of 1 files", "converting: 1 of 1 files"]


def test_the_verb_says_it_in_json(torrent: Path, out: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(torrent), str(out), "--shard-mib", "1", "--json"])
    told = json.loads(result.stdout)
    assert (told["family"], told["folder"], told["kept_shards"]) == ("mixtral", str(out), 0)


def test_the_verb_tells_a_refusal_in_one_line(tmp_path: Path, out: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(tmp_path), str(out)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: model '")


def test_serving_pickles_names_the_verb_and_starts_nothing(torrent: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(torrent)])
    assert result.exit_code == 2
    assert "`moesaic convert FOLDER OUT`" in result.stderr


def test_the_bar_fits_eighty_columns() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with ConvertProgress(console) as progress:
        progress.show(Progressed(43 << 30, 87 << 30, 10, 22))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "43.0/87.0 GiB" in text
    assert max(len(line) for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()) <= 80


@pytest.mark.shared
@pytest.mark.parametrize(
    ("pickles", "published"),
    [
        ("mixtral/torrent_dec2023", "mixtral/hf_v4"),
        ("mixtral/stacked_pt", "mixtral/hf_v4"),
        ("mistral-sliding-window/mistral_native_pth", "mistral-sliding-window/hf_v4"),
    ],
)
def test_the_reference_pickles_become_the_reference_folders_bit_by_bit(
    shared: Path, out: Path, pickles: str, published: str
) -> None:
    goldens = shared / "goldens"
    run(goldens / pickles, out)
    assert_same(tensors(out), tensors(goldens / published))
    ours, theirs = (describe_model(open_checkpoint(folder)) for folder in (out, goldens / published))
    assert (ours.mixers, ours.experts, ours.dense) == (theirs.mixers, theirs.experts, theirs.dense)
