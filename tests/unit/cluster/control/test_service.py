"""What is left of calls whose callers go away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.control.service import ControlService
from moesaic.v1 import control_pb2

WAIT_S = 30.0


class SlowUpload:
    """An upload in which one step takes until it is let go, and which notes the order of what is done."""

    def __init__(self, slow: str) -> None:
        self.done: list[str] = []
        self.reached, self.let_go = threading.Event(), threading.Event()
        self._slow = slow

    def write_manifest(self, data: bytes) -> None:
        self._do("write")

    def finish(self) -> None:
        self._do("finish")

    def close(self) -> None:
        self.done.append("close")

    def _do(self, step: str) -> None:
        if step == self._slow:
            self.reached.set()
            assert self.let_go.wait(WAIT_S)
        self.done.append(step)


async def parts() -> AsyncIterator[control_pb2.UploadBundleRequest]:
    yield control_pb2.UploadBundleRequest(manifest=b"{}")


@pytest.mark.parametrize(("slow", "done"), [("write", ["write"]), ("finish", ["write", "finish"])])
async def test_nothing_is_cleaned_up_under_the_hands_of_an_upload_whose_caller_leaves(
    slow: str, done: list[str]
) -> None:
    upload = SlowUpload(slow)
    plane = SimpleNamespace(bundles=SimpleNamespace(upload=cast(Callable[[], Any], lambda: upload)))
    service = ControlService(cast(Any, plane))
    call = asyncio.create_task(service.UploadBundle(parts(), cast(Any, None)))
    assert await asyncio.to_thread(upload.reached.wait, WAIT_S)
    call.cancel()
    await asyncio.sleep(0)
    assert "close" not in upload.done
    upload.let_go.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert upload.done == [*done, "close"]
