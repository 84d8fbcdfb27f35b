"""`moesaic serve` in an environment that is unkind to it: proxies, files in the way, long paths, IPv6, -O."""

from __future__ import annotations

import json
import signal
import socket
import stat
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.serve_command import Serve, serving

from moesaic import SyncClient

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

PROMPT = [5, 17, 42, 8]
# Nothing listens there, so whatever goes by way of it fails.
DEAD_PROXY = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"), "http://127.0.0.1:9")
WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# Our packages, and modules that we, torch or Ray import.
HOSTILE = (
    *(
        "router",
        "gateway",
        "expert_worker",
        "moesaic",
        "numpy",
        "torch",
        "ray",
        "grpc",
        "typer",
        "rich",
        "psutil",
    ),
    *("yaml", "uvicorn", "fastapi", "safetensors", "transformers", "sympy", "sitecustomize", "usercustomize"),
)


def answer(address: str) -> int:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 4, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://{address}/v1/completions", body, {"content-type": "application/json"}
    )
    with WITHOUT_PROXY.open(request, timeout=60) as reply:
        return int(reply.status)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose modules note that they were run."""
    folder = tmp_path_factory.mktemp("hostile")
    note = "import os, pathlib\npathlib.Path(r'{}').joinpath('{}').touch()\n"
    (folder / "run").mkdir()
    for index, name in enumerate(HOSTILE):
        module = folder / f"{name}.py" if index % 2 else folder / name / "__init__.py"
        module.parent.mkdir(exist_ok=True)
        module.write_text(note.format(folder / "run", name))
    return folder


@pytest.fixture(scope="module")
def unkind(tiny: Path, hostile: Path) -> Iterator[Serve]:
    with tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp") as temp:
        long = Path(temp) / ("long" * 30)
        long.mkdir()
        env = {**DEAD_PROXY, "no_proxy": "", "NO_PROXY": "", "TMPDIR": str(long)}
        with serving(str(tiny), "--workers", "2", env=env, cwd=hostile) as serve:
            serve.wait_ready()
            yield serve
            serve.popen.send_signal(signal.SIGTERM)
            assert serve.end() == 0
            serve.assert_nothing_is_left()


def test_a_proxy_in_the_environment_is_not_asked_for_addresses_of_the_cluster(
    unkind: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer(unkind.http) == 200
    for name, value in {**DEAD_PROXY, "no_proxy": "", "NO_PROXY": ""}.items():
        monkeypatch.setenv(name, value)
    with SyncClient(unkind.grpc) as client:
        assert len(client.complete(PROMPT, max_tokens=2, ignore_eos=True).token_ids) == 2


def test_no_module_of_the_working_directory_is_run(unkind: Serve, hostile: Path) -> None:
    assert [note.name for note in (hostile / "run").iterdir()] == []


def test_a_long_tmpdir_is_passed_over_for_a_private_folder_in_a_short_place(unkind: Serve) -> None:
    head = next(process for process in unkind.members() if process.name() == "gcs_server")
    folder = Path(head.environ()["TMPDIR"])
    assert folder.parent in (Path("/tmp"), Path("/var/tmp"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(("host", "level"), [("::1", "1"), ("::", "2")])
def test_it_serves_on_ipv6_and_without_assertions(tiny: Path, host: str, level: str) -> None:
    flags = ("--host", host) if has_ipv6() else ()
    with serving(str(tiny), *flags, env={"PYTHONOPTIMIZE": level}) as serve:
        serve.wait_ready()
        if flags:
            assert serve.http.startswith(f"[{host}]:")
            assert serve.grpc.startswith(f"[{host}]:")
        assert answer(serve.http) == 200
        with SyncClient(serve.grpc) as client:
            assert len(client.complete(PROMPT, max_tokens=2, ignore_eos=True).token_ids) == 2
        assert {process["state"] for process in serve.status()["topology"]["processes"]} == {"ready"}
        serve.interrupt()
        assert serve.end() == 0


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True
