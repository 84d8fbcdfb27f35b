"""`moesaic convert` as a process: what it leaves when it is killed, and how much memory it needs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import torch
from support.checkpoints import random_mixtral
from support.mistral_checkpoints import write_mistral_format

from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.families import describe_model

TIMEOUT_S = 240

KILLED_IN_THE_THIRD_FILE = """
import os, signal, sys
from pathlib import Path
from cluster.checkpoints.conversion import convert

def tell(progress):
    if progress.done_files == 2:
        os.kill(os.getpid(), signal.SIGKILL)

convert(Path(sys.argv[1]), Path(sys.argv[2]), max_shard_bytes=1 << 20, show=tell)
"""

# Bytes by which the resident set grows over the conversion, mapped pages of files included.
GROWTH = """
import re, sys
from pathlib import Path
from cluster.checkpoints.conversion import convert

def kibibytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

tiny, large, out = map(Path, sys.argv[1:])
# Loads every module and warms every pool before the count begins.
convert(tiny, out / "tiny", max_shard_bytes=1 << 30, show=lambda _: None)
Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
before = kibibytes("VmRSS")
convert(large, out / "large", max_shard_bytes=1 << 30, show=lambda _: None)
print(kibibytes("VmHWM") - before << 10)
"""


def run(program: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_a_conversion_that_was_killed_is_no_model_until_it_was_run_again(tmp_path: Path) -> None:
    folder = write_mistral_format(
        tmp_path / "torrent", random_mixtral(hidden_size=128, intermediate_size=256), "torrent"
    )
    out = tmp_path / "out"
    killed = run(KILLED_IN_THE_THIRD_FILE, folder, out)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "config.json").exists()
    left = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert len(left) == 2
    command = [
        sys.executable,
        "-m",
        "cluster.cli.main",
        "convert",
        str(folder),
        str(out),
        "--shard-mib",
        "1",
        "--json",
    ]
    again = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    assert json.loads(again.stdout)["kept_shards"] == 2
    assert {name: (out / name).stat().st_mtime_ns for name in left} == left
    assert describe_model(open_checkpoint(out)).family == "mixtral"


def test_memory_does_not_grow_with_the_size_of_the_model(tmp_path: Path) -> None:
    tiny = write_mistral_format(tmp_path / "tiny", random_mixtral(), "torrent")
    large = write_large_mistral(tmp_path / "large", num_layers=16)
    num_bytes = (large / "consolidated.00.pth").stat().st_size
    measured = run(GROWTH, tiny, large, tmp_path / "out")
    assert measured.returncode == 0, measured.stderr
    assert num_bytes > 400 << 20
    # What stays mapped (128 MiB), and the largest tensor.
    assert int(measured.stdout) < 200 << 20


def write_large_mistral(folder: Path, *, num_layers: int) -> Path:
    """25 MiB a layer, of zeros."""
    hidden_size, inner_size, vocab_size = 512, 8192, 1024

    def layer(index: int) -> dict[str, tuple[int, ...]]:
        prefix, square = f"layers.{index}.", (hidden_size, hidden_size)
        return {
            **{f"{prefix}attention.w{letter}.weight": square for letter in "qkvo"},
            **{f"{prefix}{name}_norm.weight": (hidden_size,) for name in ("attention", "ffn")},
            **{f"{prefix}feed_forward.{name}.weight": (inner_size, hidden_size) for name in ("w1", "w3")},
            f"{prefix}feed_forward.w2.weight": (hidden_size, inner_size),
        }

    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (vocab_size, hidden_size),
        "norm.weight": (hidden_size,),
        "output.weight": (vocab_size, hidden_size),
    }
    for index in range(num_layers):
        shapes |= layer(index)
    folder.mkdir()
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    torch.save(tensors, folder / "consolidated.00.pth")
    params = {
        "dim": hidden_size,
        "n_layers": num_layers,
        "hidden_dim": inner_size,
        "n_heads": 8,
        "n_kv_heads": 8,
        "norm_eps": 1e-5,
        "vocab_size": vocab_size,
    }
    (folder / "params.json").write_text(json.dumps(params))
    return folder
