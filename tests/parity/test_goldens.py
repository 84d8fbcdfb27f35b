"""Every reference model of every decoder family, through real worker processes: the logits of its reference, prefill and
decode, and the very same greedy tokens.

StripedHyena has a file of its own. Mixtral and Mistral come in many layouts: all must give the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.local_router import LocalRouter, local_router, lonely_router
from support.processes import running_workers

from cluster.checkpoints.conversion import convert
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.families import DenseLayers, describe_model

pytestmark = pytest.mark.shared

LOGITS_TOLERANCE = 1e-4
NUM_NEW = 12

FAMILIES = ("qwen3-moe", "qwen2-moe", "olmoe", "flex-olmo", "deepseek-v3", "gpt-oss")
DENSE = ("mistral-dense", "phi-2")
# What our own decoder runs, too; all others are on the modules of transformers anyway.
LEAN = {"mixtral", "mistral-sliding-window", "mistral-dense", "qwen3-moe", "qwen2-moe", "olmoe"}
# As they are published, and whether they are pickles, which are converted first.
LAYOUTS = {
    "mixtral": {
        "hf_v4": False,
        "hf_v5_fused": False,
        "mistral_native": False,
        "torrent_dec2023": True,
        "stacked_pt": True,
    },
    "mistral-sliding-window": {"hf_v4": False, "mistral_native": False, "mistral_native_pth": True},
}


@pytest.mark.parametrize("name", [*FAMILIES, *DENSE])
def test_a_family_gives_the_logits_and_tokens_of_its_reference(
    shared: Path, tmp_path: Path, name: str
) -> None:
    golden = shared / "goldens" / name
    dense_layers: DenseLayers = "experts" if name in DENSE else "auto"
    # The config as transformers writes it now, and as it was published.
    old_form = with_config(golden / "checkpoint", golden / "config_v4.json", tmp_path)
    folders = (golden / "checkpoint", old_form)
    with routers(*folders, name=name, dense_layers=dense_layers, spread=True) as opened:
        for router in opened:
            check(router, golden)


@pytest.mark.parametrize("name", [*DENSE, "mistral-sliding-window"])
def test_a_dense_model_needs_no_workers_where_the_router_computes_it(shared: Path, name: str) -> None:
    golden = shared / "goldens" / name
    folder = golden / ("hf_v4" if name in LAYOUTS else "checkpoint")
    for decoder in decoders(name):
        check(lonely_router(folder, dense_layers="router", decoder=decoder), golden)


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]
)
def test_all_layouts_of_the_same_weights_give_the_same(
    shared: Path, tmp_path: Path, name: str, layout: str
) -> None:
    golden = shared / "goldens" / name
    folder = golden / layout
    if LAYOUTS[name][layout]:
        folder = tmp_path / "converted"
        convert(golden / layout, folder, max_shard_bytes=1 << 20, show=lambda _: None)
    with routers(folder, name=name, dense_layers="experts") as opened:
        for router in opened:
            check(router, golden)
            check_forced(router, golden)
            first_logits, _ = lonely_router(golden / "hf_v4", dense_layers="experts").run(inputs_of(golden))
            for rows, first in zip(router.run(inputs_of(golden))[0], first_logits, strict=True):
                torch.testing.assert_close(rows, first, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("output", "mode"),
    [
        ("output_hidden", "hidden"),
        ("output_hidden_per_expert", "hidden"),
        ("output_cheap_embed", "cheap_embed"),
        ("output_random", "random"),
    ],
)
def test_what_mergekit_composes_is_served(shared: Path, output: str, mode: str) -> None:
    golden = shared / "goldens" / "mergekit-moe"
    with routers(golden / output, name="mixtral") as opened:
        for router in opened:
            check(router, golden, prefix=f"{mode}.")


@contextmanager
def routers(
    *folders: Path, name: str, dense_layers: DenseLayers = "auto", spread: bool = False
) -> Iterator[list[LocalRouter]]:
    """Routers over each of these folders of one model and on each decoder, all over the same worker, or with `spread`
    over two that hold unequal shares of experts."""
    with ExitStack() as stack:
        most = max(describe_model(open_checkpoint(folders[0]), dense_layers).num_slots.values())
        shares = ["0", f"1-{most - 1}"] if spread and most > 1 else ["all"]
        workers = stack.enter_context(running_workers(folders[0], shares, "--dense-layers", dense_layers))
        addresses = [worker.address for worker in workers]
        yield [
            stack.enter_context(local_router(folder, addresses, dense_layers=dense_layers, decoder=decoder))
            for folder in folders
            for decoder in decoders(name)
        ]


def decoders(name: str) -> tuple[str, ...]:
    return ("lean", "hf") if name in LEAN else ("auto",)


def with_config(checkpoint: Path, config: Path, folder: Path) -> Path:
    """The same checkpoint under another config."""
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    (folder / "config.json").write_bytes(config.read_bytes())
    return folder


def inputs_of(golden: Path, prefix: str = "") -> list[list[int]]:
    inputs: list[list[int]] = load_file(golden / "inputs.safetensors")[prefix + "input_ids"].tolist()
    return inputs


def check(router: LocalRouter, golden: Path, prefix: str = "") -> None:
    """Whole prompts and then token by token, together, alone, and in pieces."""
    inputs = inputs_of(golden, prefix)
    expected = load_file(golden / "expected.safetensors")
    together = router.run(inputs, num_new=NUM_NEW)
    alone = router.run(inputs[:1], num_new=NUM_NEW)
    pieces = router.run(inputs, num_new=NUM_NEW, max_batch_tokens=7)
    for logits, tokens in (together, alone, pieces):
        for index, (rows, output) in enumerate(zip(logits, tokens, strict=True)):
            assert output == expected[prefix + "greedy_tokens"][index].tolist()
            length = len(inputs[index])
            assert_close(rows[:length], expected, prefix + "logits", index)
            if prefix + "greedy_logits" in expected:
                assert_close(rows[length - 1 : -1], expected, prefix + "greedy_logits", index)


def check_forced(router: LocalRouter, golden: Path) -> None:
    """The first part of the input in one pass, the rest token by token."""
    inputs = inputs_of(golden)
    expected = load_file(golden / "expected.safetensors")
    first = int(load_file(golden / "inputs.safetensors")["prefill_len"].item())
    logits, _ = router.run(
        [tokens[:first] for tokens in inputs],
        num_new=len(inputs[0]) - first,
        following=[tokens[first:] for tokens in inputs],
    )
    for index, rows in enumerate(logits):
        assert_close(rows[:first], expected, "prefill_logits", index)
        assert_close(rows[first:], expected, "decode_logits", index)


def assert_close(rows: torch.Tensor, expected: Mapping[str, torch.Tensor], name: str, index: int) -> None:
    torch.testing.assert_close(rows, expected[name][index], atol=LOGITS_TOLERANCE, rtol=0)
