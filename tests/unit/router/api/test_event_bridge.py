"""Events on their way from one thread to an event loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from router.api.event_bridge import EventBridge


async def test_everything_arrives_in_order_whatever_thread_it_comes_from() -> None:
    bridge, received, done = EventBridge(), list[int](), asyncio.Event()

    def send() -> None:
        for number in range(10_000):
            bridge.put(received.append, number)
        bridge.put(done.set)

    thread = threading.Thread(target=send)
    thread.start()
    await asyncio.wait_for(done.wait(), 60)
    thread.join()
    assert received == list(range(10_000))


async def test_many_events_wake_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, wakes = asyncio.get_running_loop(), 0
    call_soon_threadsafe = loop.call_soon_threadsafe

    def count(*args: object) -> asyncio.Handle:
        nonlocal wakes
        wakes += 1
        return call_soon_threadsafe(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "call_soon_threadsafe", count)
    bridge, received = EventBridge(), list[int]()
    for number in range(64):
        bridge.put(received.append, number)
    await asyncio.sleep(0)
    assert wakes == 1 and received == list(range(64))
    bridge.put(received.append, 64)
    await asyncio.sleep(0)
    assert wakes == 2 and received[-1] == 64


def test_an_event_for_a_closed_loop_is_dropped() -> None:
    async def make() -> EventBridge:
        return EventBridge()

    bridge, delivered = asyncio.run(make()), list[str]()
    bridge.put(delivered.append, "too late")
    assert delivered == []
