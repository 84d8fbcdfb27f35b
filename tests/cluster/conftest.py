"""A real cluster for a module of tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import write_mixtral
from support.serve_command import Serve, serving


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixtral(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[Serve]:
    """Two workers on a tiny random model. It must end cleanly on SIGTERM, whatever the tests did to it."""
    with serving(str(tiny), "--workers", "2") as serve:
        serve.wait_ready()
        yield serve
        serve.popen.send_signal(signal.SIGTERM)
        assert serve.end() == 0
        serve.assert_nothing_is_left()
