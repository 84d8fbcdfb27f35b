"""Fixtures for all tests."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.closed_ports import closed_port

from moesaic import telemetry
from moesaic.garbage import freeze_lasting_objects

# Before torch is imported anywhere: test processes share few cores, and spinning threads would fight for them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A machine that is busy with something else is slow, not wrong.
hypothesis.settings.register_profile("moesaic", deadline=None)
hypothesis.settings.load_profile("moesaic")

ROOT = Path(__file__).parents[1]


def pytest_collection_finish() -> None:
    freeze_lasting_objects()  # collections of garbage need not look through all that was imported


@pytest.fixture(autouse=True)
def _environment_stays_as_it_was() -> Iterator[None]:
    """A command that runs inside a test sets variables for the processes that it starts; the next test has none of them."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference data beside the checkout; a test that needs it is skipped where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the reference data (../shared) is not here")
    return folder


@pytest.fixture
def closed_address() -> Iterator[str]:
    """HOST:PORT at which nobody listens."""
    with closed_port() as port:
        yield f"127.0.0.1:{port}"


@pytest.fixture
def silent_address() -> Iterator[str]:
    """HOST:PORT that accepts connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield f"127.0.0.1:{silent.getsockname()[1]}"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What this process traces."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "TRACER", provider.get_tracer("test"))
    return exporter
