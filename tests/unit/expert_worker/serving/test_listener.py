"""Callers are let in one by one; without a file descriptor left they are turned away."""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from expert_worker.serving.listener import Listener

WAIT_S = 60.0


@pytest.fixture
def entrance() -> Iterator[Listener]:
    made = Listener(socket.create_server(("127.0.0.1", 0)))
    yield made
    made.close()


@contextmanager
def caller_of(entrance: Listener) -> Iterator[socket.socket]:
    """Stands before the entrance."""
    with socket.socket(fileno=os.dup(entrance.fileno())) as listening:
        address = listening.getsockname()
    with socket.create_connection(address, timeout=WAIT_S) as caller:
        assert select.select([entrance], [], [], WAIT_S)[0]
        yield caller


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_caller_is_let_in(entrance: Listener) -> None:
    with caller_of(entrance) as caller:
        accepted = entrance.accept()
        assert accepted is not None
        with accepted:
            assert accepted.getpeername() == caller.getsockname()


def test_where_nobody_stands_nobody_is_let_in(entrance: Listener) -> None:
    assert entrance.accept() is None


def test_without_a_descriptor_left_callers_are_turned_away_and_none_is_left_standing(
    entrance: Listener,
) -> None:
    for _ in range(2):
        with caller_of(entrance) as caller:
            with no_descriptor_left():
                assert entrance.accept() is None
            assert caller.recv(1) == b""
            assert not select.select([entrance], [], [], 0)[0]
    with caller_of(entrance):
        accepted = entrance.accept()
        assert accepted is not None
        accepted.close()


def test_a_spare_descriptor_that_another_thread_took_is_replaced_as_soon_as_there_is_one(
    entrance: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caller_of(entrance) as caller, no_descriptor_left(), monkeypatch.context() as patched:
        patched.setattr(os, "open", _taken)
        assert entrance.accept() is None
        assert caller.recv(1) == b""
    assert entrance.accept() is None
    with caller_of(entrance) as caller, no_descriptor_left():
        assert entrance.accept() is None
        assert caller.recv(1) == b""


def _taken(*_: object) -> int:
    raise OSError(errno.EMFILE, "another thread was faster")
