"""Every way in which transformers decodes gives the same tokens, and the fastest is kept."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from cluster.bench import transformers_program
from cluster.bench.transformers_program import PlainModel, Way

PROMPTS = [[5, 17, 42], [9, 1, 3]]
NUM_TOKENS = 6


@pytest.fixture
def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("decoding", [Way("eager", "static"), Way("grouped_mm", "dynamic")])
def test_the_fastest_way_decodes_as_a_plain_loop_does(
    mixtral: MixtralForCausalLM, monkeypatch: pytest.MonkeyPatch, decoding: Way
) -> None:
    monkeypatch.setattr(transformers_program, "_fastest", lambda seconds: decoding)
    with torch.inference_mode():
        batch = PlainModel(mixtral).run(PROMPTS, NUM_TOKENS)
        ids = torch.tensor(PROMPTS)
        for _ in range(NUM_TOKENS):
            logits = mixtral(input_ids=ids, use_cache=False).logits
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    assert batch.token_ids == ids[:, len(PROMPTS[0]) :].tolist()
    assert batch.decoding == str(decoding)
    assert {"eager, dynamic cache", "eager, static cache"} <= set(batch.trials.decoding_s)


def test_one_token_needs_no_way_of_decoding(mixtral: MixtralForCausalLM) -> None:
    with torch.inference_mode():
        batch = PlainModel(mixtral).run(PROMPTS, 1)
    assert [len(ids) for ids in batch.token_ids] == [1, 1]
    assert batch.trials.decoding_s == {}
    assert batch.trials.reading_s


def test_a_way_that_fails_is_never_the_fastest() -> None:
    def trial_s(way: Way) -> float:
        if way.cache == "static":
            raise TypeError("no such cache for this model")
        return 1.0

    ways = [Way("eager", "static"), Way("eager", "dynamic")]
    seconds = {way: transformers_program._unless_impossible(trial_s, way) for way in ways}
    assert seconds[ways[0]] == math.inf
    assert transformers_program._fastest(seconds) == ways[1]
