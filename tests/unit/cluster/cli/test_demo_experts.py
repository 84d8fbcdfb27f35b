"""What `moesaic demo-experts` measures and says, against a router that is played."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from cluster.bundles.demo_bundles import BETTER, BUNDLES, FIRST
from cluster.cli.demo_experts import SHOWN, Step, _as_json, _print_closing, _table
from cluster.cli.reading import SUMS, Reading, load_texts, read
from moesaic import Client, Deny
from moesaic.bundles import open_bundle
from moesaic.expert_policy import ExpertPolicy


def reading(answer: str, logprob: float = -1.0) -> Reading:
    logprobs = dict.fromkeys(load_texts(), (logprob, logprob))
    return Reading(logprobs, dict.fromkeys(SUMS, answer))


STEPS = [
    Step("before", reading("256")),
    Step("add", reading("17"), 0.25),
    Step("swap", reading("19"), 0.5),
    Step("deny", reading("256"), equal_to_before=True),
    Step("remove", reading("256"), 0.125, equal_to_before=False),
]


class PlayedClient:
    """Gives every token of a text the same log probability, and 19 as the answer to every sum."""

    def __init__(self) -> None:
        self.policies: list[ExpertPolicy] = []

    async def complete(self, prompt: str, *, experts: ExpertPolicy, **options: Any) -> Any:
        self.policies.append(experts)
        scores = [SimpleNamespace(logprob=None), *(SimpleNamespace(logprob=-2.0) for _ in range(3))]
        return SimpleNamespace(text=" 19\n", prompt=SimpleNamespace(logprobs=scores))


async def test_a_reading_scores_every_text_and_asks_every_sum_under_one_policy() -> None:
    client = PlayedClient()
    found = await read(cast(Client, client), load_texts(), Deny("maths"))
    assert found.perplexity == {name: pytest.approx(math.exp(2.0)) for name in load_texts()}
    assert set(found.answers.values()) == {"19"} and found.num_right == 1
    assert client.policies == [Deny("maths")] * (len(load_texts()) + len(SUMS))


def test_readings_are_equal_to_the_last_bit_or_not_at_all() -> None:
    one = reading("19")
    assert one == reading("19")
    assert one != replace(one, logprobs={**one.logprobs, "drama": (-1.0, math.nextafter(-1.0, 0.0))})


def test_the_table_fits_80_columns_and_the_closing_says_what_is_as_before() -> None:
    out = Console(file=io.StringIO(), width=80)
    out.print(_table(STEPS))
    _print_closing(out, STEPS)
    text = cast(io.StringIO, out.file).getvalue()
    assert all(name in text for name in (*load_texts(), SHOWN, "0.25 s", "1/10"))
    assert max(map(len, text.splitlines())) <= 80
    assert f"{SHOWN} 256 before, 19 with {BETTER}" in text
    assert "deny: as before to the last bit" in text and "remove: not as before" in text


def test_the_json_has_every_step() -> None:
    steps = cast(list[dict[str, Any]], _as_json(STEPS)["steps"])
    assert [step["step"] for step in steps] == ["before", "add", "swap", "deny", "remove"]
    assert [step["equal_to_before"] for step in steps] == [None, None, None, True, False]
    assert steps[2]["answers"][SHOWN] == "19" and steps[2]["sums_right"] == 1


def test_the_sums_are_right() -> None:
    for question, answer in SUMS.items():
        first, sign, second, _ = question.split()
        assert int(answer) == int(first) + (int(second) if sign == "+" else -int(second))


def test_the_better_bundle_replaces_what_the_first_one_adds() -> None:
    first, better = (open_bundle(BUNDLES / name).manifest for name in (FIRST, BETTER))
    assert first.adds_slots and {expert.slot for expert in better.experts} == {8}
    assert [expert.layer for expert in first.experts] == [expert.layer for expert in better.experts]
