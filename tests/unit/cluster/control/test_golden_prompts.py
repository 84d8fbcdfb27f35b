"""Prompts whose log probabilities are compared between two epochs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.played_cluster import PlayedRouter, playing

from cluster.control.golden_prompts import measure_drift, read_prompts
from moesaic.errors import InvalidArgument, NotFound
from moesaic.v1 import inference_pb2


class ScoringRouter(PlayedRouter):
    """Every token of a prompt but the first has the log probability of the epoch."""

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: object
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        if request.epoch not in ("old", "new"):
            raise NotFound("epoch: is not held", field="epoch")
        assert request.sampling.HasField("prompt_logprobs")
        each = {"old": -1.0, "new": -1.5}[request.epoch]
        logprobs = [inference_pb2.TokenLogprob(token_id=1)]
        logprobs += [inference_pb2.TokenLogprob(token_id=1, logprob=each) for _ in request.text.split()[1:]]
        yield inference_pb2.GenerateResponse(prompt=inference_pb2.PromptInfo(logprobs=logprobs))
        yield inference_pb2.GenerateResponse(text="x")


async def test_the_drift_is_the_mean_difference_of_all_tokens() -> None:
    async with playing(ScoringRouter(inference_pb2.GetRouterStatsResponse())) as (address, _):
        assert await measure_drift(address, ["a b c", "d e"], ("old", "new")) == pytest.approx(0.5)
        assert await measure_drift(address, ["a b c"], ("old", "old")) == 0.0
        with pytest.raises(NotFound):
            await measure_drift(address, ["a b c"], ("old", "gone"))


def test_a_file_of_prompts_has_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "golden.txt"
    file.write_text("one\n\n  \ntwo words\n")
    assert read_prompts(file) == ("one", "two words")
    for content in ("", "\n", "x\n" * 257):
        file.write_text(content)
        with pytest.raises(InvalidArgument, match="golden_prompts: must be 1 to 256 lines"):
            read_prompts(file)
    with pytest.raises(InvalidArgument, match="golden_prompts: cannot be read: No such file"):
        read_prompts(tmp_path / "none")
