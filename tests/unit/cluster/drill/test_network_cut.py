"""The rules by which packets are dropped, in a table that nothing else uses."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from cluster.drill.faults import Direction
from cluster.drill.network_cut import rules


@pytest.mark.parametrize(
    ("direction", "dropped"),
    [(Direction.IN, {"input"}), (Direction.OUT, {"output"}), (Direction.BOTH, {"input", "output"})],
)
def test_a_cut_drops_what_it_says_in_its_direction(direction: Direction, dropped: set[str]) -> None:
    lines = rules("t", ["10.0.0.2", "fd00::2"], direction)
    drops = [line.split() for line in lines if line.startswith("add rule")]
    assert {words[4] for words in drops} == dropped
    assert {tuple(words[5:6] + words[7:8]) for words in drops} == {("ip", "10.0.0.2"), ("ip6", "fd00::2")}
    assert {words[6] for words in drops} == {
        {"input": "saddr", "output": "daddr"}[chain] for chain in dropped
    }


def test_nft_accepts_the_rules() -> None:
    if shutil.which("nft") is None:
        pytest.skip("needs nft")
    program = "".join(rules("moesaic_drill_test", ["10.0.0.2", "fd00::2"], Direction.BOTH))
    done = subprocess.run(
        ["nft", "--check", "-f", "-"], input=program, text=True, capture_output=True, timeout=10
    )
    if "Operation not permitted" in done.stderr:
        pytest.skip("needs root")
    assert done.returncode == 0, done.stderr
