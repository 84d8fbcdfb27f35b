"""Encoder-decoders: what their references compute, by experts in other processes, whole, in a crowd and starting over."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file
from support.encoder_decoders import (
    VOCAB,
    NllbReference,
    greedy,
    route_by,
    switch_logits,
    write_nllb,
    write_switch,
)
from support.local_router import LocalRouter, local_router, lonely_router
from support.processes import running_router, running_workers
from torch import Tensor

from moesaic.client.sync_client import SyncClient
from moesaic.errors import Unsupported
from moesaic.families import DenseLayers
from router.attention.packed_batch import pack
from router.decoders.decoder import MicroBatch
from router.decoders.encoder_decoder.batch import PromptRows
from router.decoders.encoder_decoder.decoder import EncoderDecoder
from router.scheduling.sequence import Chunk
from router.scheduling.sequence import Sequence as ScheduledSequence

LOGITS_TOLERANCE = 1e-4
GOLDENS = ("switch-transformers", "nllb-moe")


@pytest.mark.shared
@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize(
    ("dense_layers", "shares"), [("router", ["0-2", "3-7"]), ("experts", ["0:0,1:0-7,2:0", "3:0-7"])]
)
def test_goldens_through_workers(
    shared: Path, name: str, dense_layers: DenseLayers, shares: list[str]
) -> None:
    golden = shared / "goldens" / name
    with (
        running_workers(golden / "checkpoint", shares, "--dense-layers", dense_layers) as workers,
        local_router(
            golden / "checkpoint", [worker.address for worker in workers], dense_layers=dense_layers
        ) as router,
    ):
        check_golden(router, golden)


@pytest.mark.shared
@pytest.mark.parametrize("name", GOLDENS)
def test_goldens_token_by_token_where_a_batch_is_smaller_than_a_prompt(shared: Path, name: str) -> None:
    golden = shared / "goldens" / name
    check_golden(lonely_router(golden / "checkpoint"), golden, max_batch_tokens=7)


@pytest.mark.shared
@pytest.mark.parametrize("name", GOLDENS)
def test_the_encoder_gives_what_that_of_the_reference_gives(shared: Path, name: str) -> None:
    golden = shared / "goldens" / name
    expected = load_file(golden / "expected.safetensors")["encoder_last_hidden_state"]
    encoded = encode(lonely_router(golden / "checkpoint"), inputs_of(golden))
    for rows, its_expected in zip(encoded, expected, strict=True):
        scale = float(its_expected.abs().max())
        torch.testing.assert_close(rows, its_expected, atol=1e-4 * scale, rtol=0)


@pytest.mark.shared
@pytest.mark.parametrize("name", GOLDENS)
def test_a_client_gets_several_answers_and_is_told_what_an_encoder_does_not_have(
    shared: Path, name: str
) -> None:
    golden = shared / "goldens" / name
    expected = load_file(golden / "expected.safetensors")
    with (
        running_workers(golden / "checkpoint", ["0,2,4,6", "1,3,5,7"]) as workers,
        running_router(golden / "checkpoint", workers) as router,
        SyncClient(router.address) as client,
    ):
        assert client.model_info().encodes_prompts
        for prompt, tokens in zip(inputs_of(golden), expected["greedy_tokens"].tolist(), strict=True):
            options: Any = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
            answer = list(client.generate(prompt, n=3, **options))
            for index in range(3):
                assert [t for part in answer if part.index == index for t in part.token_ids] == tokens
            stopped = client.complete(prompt, **{**options, "stop_token_ids": tokens[4:5]})
            assert list(stopped.token_ids) == tokens[: tokens.index(tokens[4]) + 1]
        # What a decoder is given to begin with is not part of its answer.
        given_ids = load_file(golden / "inputs.safetensors")["decoder_input_ids"].tolist()
        for prompt, tokens, rows in zip(inputs_of(golden), given_ids, expected["logits"], strict=True):
            for length in (1, 5, 16):
                begun = client.complete(
                    prompt, decoder_prompt=tokens[1:length], max_tokens=1, temperature=0, ignore_eos=True
                )
                assert list(begun.token_ids) == [int(rows[length - 1].argmax())]
        for refused in ({"prompt_logprobs": 0}, {"prompt_logprobs": 3}):
            with pytest.raises(Unsupported) as error:
                client.complete(inputs_of(golden)[0], **cast(Any, refused))
            assert error.value.field == "prompt_logprobs"
        gates = client.router_stats().gates
    assert [gate.layer for gate in gates] == [1, 3]
    assert all(gate.z_loss > 0 and not gate.assignments for gate in gates)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), seed=st.integers(0, 1000))
def test_random_switch_models_give_the_logits_and_tokens_of_transformers(
    data: st.DataObject, seed: int
) -> None:
    layers = st.integers(1, 3)
    num_layers, num_decoder_layers = data.draw(layers), data.draw(layers)
    config = {
        "d_model": data.draw(st.sampled_from([16, 24])),
        "d_kv": data.draw(st.sampled_from([4, 10])),
        "d_ff": data.draw(st.sampled_from([12, 36])),
        "num_heads": data.draw(st.integers(1, 4)),
        "num_experts": data.draw(st.integers(1, 8)),
        "num_layers": num_layers,
        "num_decoder_layers": num_decoder_layers,
        "num_sparse_encoder_layers": data.draw(st.integers(1, num_layers)),
        "num_sparse_decoder_layers": data.draw(st.integers(1, num_decoder_layers)),
        "relative_attention_num_buckets": data.draw(st.sampled_from([8, 16, 32])),
        "relative_attention_max_distance": data.draw(st.sampled_from([20, 64])),
        "router_bias": data.draw(st.booleans()),
        "tie_word_embeddings": data.draw(st.booleans()),
        "dense_act_fn": data.draw(st.sampled_from(["relu", "gelu_new", "silu"])),
        "layer_norm_epsilon": data.draw(st.sampled_from([1e-6, 1e-3])),
        "decoder_start_token_id": data.draw(st.integers(0, 5)),
        "expert_capacity": 1000,
    }
    dense_layers: DenseLayers = data.draw(st.sampled_from(["router", "experts"]))
    with tempfile.TemporaryDirectory() as folder:
        model = write_switch(Path(folder), seed, **config)
        router = lonely_router(Path(folder), dense_layers=dense_layers)
        check(router, switch_logits(model), start=config["decoder_start_token_id"])


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), seed=st.integers(0, 1000))
def test_random_nllb_models_give_what_their_published_rule_gives(data: st.DataObject, seed: int) -> None:
    config = {
        "d_model": data.draw(st.sampled_from([16, 24])),
        "num_experts": data.draw(st.integers(2, 6)),
        "encoder_layers": data.draw(st.integers(1, 3)),
        "decoder_layers": data.draw(st.integers(1, 3)),
        "encoder_sparse_step": data.draw(st.integers(0, 2)),
        "decoder_sparse_step": data.draw(st.integers(1, 2)),
        "encoder_attention_heads": data.draw(st.sampled_from([1, 4])),
        "decoder_attention_heads": data.draw(st.sampled_from([2, 8])),
        "router_bias": data.draw(st.booleans()),
        "scale_embedding": data.draw(st.booleans()),
        "moe_token_dropout": data.draw(st.sampled_from([0.0, 0.2])),
        "pad_token_id": data.draw(st.sampled_from([1, 7])),
        "tie_word_embeddings": True,
    }
    if not config["encoder_sparse_step"]:
        # Nothing to divide by in the reference.
        config["encoder_sparse_step"] = config["encoder_layers"] + 1
    dense_layers: DenseLayers = data.draw(st.sampled_from(["router", "experts"]))
    with tempfile.TemporaryDirectory() as folder:
        write_nllb(Path(folder), seed, **config)
        router = lonely_router(Path(folder), dense_layers=dense_layers)
        check(router, NllbReference(Path(folder)).logits, start=2)


@pytest.mark.parametrize("policy", ["random", "all", "none"])
def test_the_gates_of_st_moe_on_the_tensors_of_switch(tmp_path: Path, policy: str) -> None:
    extra = {"num_selected_experts": 2, "second_expert_policy": policy}
    model = write_switch(tmp_path, 3, extra=extra, num_experts=6)
    route_by(model, lambda logits: mesh_weights(logits, policy, capacity=None))
    check(lonely_router(tmp_path), switch_logits(model), start=0)


@pytest.mark.parametrize("size", [1, 3])
def test_switch_slots_are_full_where_those_of_transformers_are(tmp_path: Path, size: int) -> None:
    model = write_switch(tmp_path, 4, expert_capacity=size)
    router = lonely_router(tmp_path, capacity="model")
    check(router, switch_logits(model), start=0)
    sparse, decoding = router.loaded.model.gate_stats.snapshot()
    assert 0 < sparse.dropped < sparse.assignments
    assert decoding.dropped == 0 < decoding.assignments


def test_slots_of_st_moe_are_full_by_the_rule_of_mesh(tmp_path: Path) -> None:
    extra = {"num_selected_experts": 2, "eval_capacity_factor": 1.0, "min_expert_capacity": 2}
    model = write_switch(tmp_path, 5, extra=extra, num_experts=6)
    route_by(
        model,
        lambda logits: mesh_weights(logits, "random", capacity=max(min(len(logits), len(logits) // 6), 2)),
    )
    router = lonely_router(tmp_path, capacity="model")
    # One at a time: a batch would share the slots.
    for prompt in prompts():
        check(router, switch_logits(model), start=0, prompts=[prompt])
    sparse, _ = router.loaded.model.gate_stats.snapshot()
    assert 0 < sparse.dropped < sparse.assignments


def test_a_capacity_is_refused_where_experts_have_none(shared: Path) -> None:
    with pytest.raises(Unsupported) as error:
        lonely_router(shared / "goldens" / "mixtral" / "hf_v4", capacity="model")
    assert error.value.field == "engine.capacity"


@pytest.mark.parametrize("engine", [{"batch_invariant": True}, {"decoder": "hf"}])
def test_what_an_encoder_decoder_cannot_be_is_refused(tmp_path: Path, engine: dict[str, Any]) -> None:
    write_switch(tmp_path, 0)
    with pytest.raises(Unsupported) as error:
        lonely_router(tmp_path, **engine)
    assert error.value.field == f"engine.{next(iter(engine))}"


@pytest.mark.parametrize("family", ["switch", "nllb"])
def test_a_sequence_that_starts_over_goes_on_as_though_nothing_had_happened(
    tmp_path: Path, family: str
) -> None:
    if family == "switch":
        write_switch(tmp_path, 6)
    else:
        write_nllb(tmp_path, 6)
    roomy = lonely_router(tmp_path, kv_block_tokens=4)
    expected_logits, expected = roomy.run(prompts(), num_new=24)
    # Room for all prompts, and hardly more.
    num_blocks = sum(-(-len(prompt) // 4) for prompt in prompts()) + 4
    cramped = roomy.with_blocks(num_blocks)
    logits, outputs = cramped.run(prompts(), num_new=24)
    assert roomy.num_preemptions == 0 < cramped.num_preemptions
    assert outputs == expected
    for rows, its_expected in zip(logits, expected_logits, strict=True):
        torch.testing.assert_close(rows, its_expected, atol=2e-5, rtol=0)


def mesh_weights(logits: Tensor, policy: str, *, capacity: int | None) -> Tensor:
    """ST-MoE's gate as Mesh TensorFlow has it, one token after the other."""
    weights, taken = torch.zeros_like(logits), [0] * logits.shape[1]
    choices = []
    for scores in logits.softmax(-1):
        first = int(scores.argmax())
        second = int(scores.scatter(0, torch.tensor(first), -1.0).argmax())
        total = scores[first] + scores[second] + 1e-9
        choices.append((first, second, scores[first] / total, scores[second] / total))
    for row, (first, _, gate, _) in zip(weights, choices, strict=True):
        if capacity is None or taken[first] < capacity:
            row[first] = gate
            taken[first] += 1
    for row, (_, second, _, gate) in zip(weights, choices, strict=True):
        if policy == "none" or (policy == "random" and gate <= 0.2):
            continue
        if capacity is None or taken[second] < capacity:
            row[second] = gate
            taken[second] += 1
    return weights


def check_golden(router: LocalRouter, golden: Path, max_batch_tokens: int = 512) -> None:
    """Greedy tokens and their logits; the logits of given decoder inputs; together and alone."""
    expected = load_file(golden / "expected.safetensors")
    given_ids = load_file(golden / "inputs.safetensors")["decoder_input_ids"].tolist()
    following = [tokens[1:] for tokens in given_ids]
    prompts = inputs_of(golden)
    for some in (slice(0, 2), slice(0, 1), slice(1, 2)):
        logits, tokens = router.run(prompts[some], num_new=12, max_batch_tokens=max_batch_tokens)
        assert tokens == expected["greedy_tokens"][some].tolist()
        for rows, its_expected in zip(logits, expected["greedy_logits"][some], strict=True):
            torch.testing.assert_close(rows[:12], its_expected, atol=LOGITS_TOLERANCE, rtol=0)
        forced, _ = router.run(
            prompts[some], num_new=15, max_batch_tokens=max_batch_tokens, following=following[some]
        )
        for rows, its_expected in zip(forced, expected["logits"][some], strict=True):
            torch.testing.assert_close(rows, its_expected, atol=LOGITS_TOLERANCE, rtol=0)


def check(
    router: LocalRouter, reference: Any, *, start: int, prompts: Sequence[Sequence[int]] | None = None
) -> None:
    """Prompts together, in one step and in several, and alone."""
    wanted = globals()["prompts"]() if prompts is None else prompts
    expected = [greedy(reference, prompt, 4, start) for prompt in wanted]
    for max_batch_tokens in (512, 3):
        logits, outputs = router.run(wanted, num_new=4, max_batch_tokens=max_batch_tokens)
        for rows, output, (its_rows, tokens) in zip(logits, outputs, expected, strict=True):
            torch.testing.assert_close(rows[:4], its_rows, atol=LOGITS_TOLERANCE, rtol=0)
            assert output == tokens


def prompts() -> list[list[int]]:
    return [
        torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in (1, 2, 17, 33)
    ]


def encode(router: LocalRouter, prompts: Sequence[Sequence[int]]) -> Sequence[Tensor]:
    """What the encoder of the router's model makes of prompts that share a batch."""
    loaded = router.loaded
    model = loaded.model
    assert isinstance(model, EncoderDecoder)
    chunks = []
    for index, prompt in enumerate(prompts):
        sequence = ScheduledSequence(str(index), list(prompt), len(prompt))
        loaded.blocks.extend(sequence.blocks, len(prompt))
        chunks.append(Chunk(sequence, 0, len(prompt)))
    batch = pack(tuple(chunks), model.layout)
    part = MicroBatch(batch, torch.arange(0), router.begin_step())
    with torch.inference_mode():
        return model.encode(part, PromptRows.of(batch)).split([len(prompt) for prompt in prompts])


def inputs_of(golden: Path) -> list[list[int]]:
    inputs: list[list[int]] = load_file(golden / "inputs.safetensors")["input_ids"].tolist()
    return inputs
