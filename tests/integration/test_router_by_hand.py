"""`python -m router`: what a person who starts one gets, and what a wrong start says."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from support.checkpoints import write_mixtral
from support.dense_checkpoints import write_mistral
from support.processes import running_gateway, running_router, running_workers
from transformers import AutoModelForCausalLM, GenerationConfig

from moesaic import SyncClient
from moesaic.errors import InvalidArgument


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "{tmp}/nowhere", "--worker", "127.0.0.1:1"], "--model {tmp}/nowhere: no such folder"),
        (
            ["--model", "{tmp}/tiny", "--worker", "::1:6001"],
            "--worker ::1:6001: must be HOST:PORT, or [HOST]:PORT for IPv6, not '::1:6001'",
        ),
        (["--model", "{tmp}/tiny"], "name either workers (--worker) or a controller (--controller)"),
        (
            ["--model", "{tmp}/tiny", "--worker", "127.0.0.1:1", "--control", "127.0.0.1:1"],
            "name either workers (--worker) or a controller (--controller)",
        ),
        (
            ["--model", "{tmp}/tiny", "--worker", "127.0.0.1:1", "--max-model-len", "99999"],
            "--max-model-len 99999: the model's context has 256 tokens",
        ),
    ],
)
def test_a_wrong_start_says_why_in_one_line(tmp_path: Path, flags: list[str], message: str) -> None:
    write_mixtral(tmp_path / "tiny")
    command = [sys.executable, "-m", "router", "--port", "0", *(flag.format(tmp=tmp_path) for flag in flags)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    errors = [line for line in run.stderr.splitlines() if not line.startswith("{")]
    assert (run.returncode, run.stdout, errors) == (2, "", [f"error: {message.format(tmp=tmp_path)}"])


def test_a_folder_without_a_tokenizer_serves_token_ids(tmp_path: Path) -> None:
    folder = write_mixtral(tmp_path / "tiny")
    with running_workers(folder, ["all"]) as workers, running_router(folder, workers) as router:
        with SyncClient(router.address) as client:
            answer = client.complete([1, 2, 3], max_tokens=4, temperature=0)
            assert len(answer.token_ids) == 4 and answer.text == ""
            with pytest.raises(InvalidArgument):
                client.complete([96], max_tokens=1)
        assert router.stop() == 0


def test_a_worker_without_anything_to_hold_says_so(tmp_path: Path) -> None:
    folder = write_mistral(tmp_path / "dense")
    command = [sys.executable, "-m", "expert_worker", "--model", str(folder), "--dense-layers", "router"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (run.returncode, run.stderr) == (2, "error: --experts: the model has none for a worker to hold\n")


def test_a_dense_model_answers_alike_with_and_without_workers(tmp_path: Path) -> None:
    folder = write_mistral(tmp_path / "dense")
    alone = ("--dense-layers", "router")
    with (
        running_router(folder, [], *alone) as router,
        running_workers(folder, ["0:0,2:0", "1:0"]) as workers,
        running_router(folder, workers) as spread,
    ):
        with SyncClient(router.address) as client, SyncClient(spread.address) as other:
            options = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
            answer = client.complete([1, 2, 3], **options)
            assert answer.token_ids == other.complete([1, 2, 3], **options).token_ids
            assert len(answer.token_ids) == 12
            infos = client.model_info(), other.model_info()
            assert [(info.num_experts, info.num_experts_per_token) for info in infos] == [(0, 0), (1, 1)]
            stats = client.router_stats()
            assert not stats.workers and stats.generated_tokens >= 12
        assert router.stop() == 0


def test_a_router_says_how_many_experts_lost_their_worker(tmp_path: Path) -> None:
    folder = write_mixtral(tmp_path / "tiny")
    with running_workers(folder, ["0-1", "2-3"]) as workers, running_router(folder, workers) as router:
        with SyncClient(router.address) as client:
            before = client.router_stats()
            assert (before.experts, before.experts_without_worker) == (8, 0)
            workers[1].kill()
            deadline_s = time.monotonic() + 60.0
            while client.router_stats().experts_without_worker != 4:
                assert time.monotonic() < deadline_s
                time.sleep(0.1)
        assert router.stop() == 0


def test_all_of_it_by_hand_on_ipv6(tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no ::1")
    folder, host = write_mixtral(tmp_path / "tiny"), ("--host", "::1")
    # Without shared memory, so that the direct stream is dialled.
    with (
        running_workers(folder, ["0-1", "2-3"], *host, "--shared-memory", "off") as workers,
        running_router(folder, workers, *host, "--shared-memory", "off") as router,
        running_gateway(router, *host) as gateway,
    ):
        assert all(process.address.startswith("[::1]:") for process in (*workers, router, gateway))
        with SyncClient(router.address) as client:
            assert len(client.complete([1, 2, 3], max_tokens=4, ignore_eos=True).token_ids) == 4
        until_ready(f"http://{gateway.address}/ready")


def until_ready(url: str) -> None:
    deadline_s = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                assert answer.status == 200
                return
        except urllib.error.HTTPError as error:  # its router is not known to it yet
            error.close()
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


def test_silent_requests_are_sampled_as_the_model_says_unless_that_is_switched_off(tmp_path: Path) -> None:
    folder = write_mistral(tmp_path / "dense")
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=1, repetition_penalty=1.3)
    config.save_pretrained(folder)
    prompt = [1, 2, 3]
    theirs = made.generate(torch.tensor([prompt]), generation_config=config, max_new_tokens=8, pad_token_id=0)
    alone = ("--dense-layers", "router")
    with (
        running_router(folder, [], *alone) as router,
        running_router(folder, [], *alone, "--generation-config", "none") as neutral,
        SyncClient(router.address) as client,
        SyncClient(neutral.address) as other,
    ):
        answer = client.complete(prompt, max_tokens=8, ignore_eos=True)
        assert answer.token_ids == tuple(theirs[0, 3:].tolist())
        found = [it.model_info().sampling_defaults for it in (client, other)]
        assert [(it.top_k, round(it.temperature, 3)) for it in found] == [(1, 0.7), (0, 1)]
