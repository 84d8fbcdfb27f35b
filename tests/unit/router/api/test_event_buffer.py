"""When a call counts as unread, and when its client counts as gone."""

from __future__ import annotations

import pytest

from router.api.event_buffer import PAUSE_AT, RESUME_AT, UNREAD_TIMEOUT_S, EventBuffer


class Rig:
    """A buffer for two sequences, a clock that stands still, and what the buffer said."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.said: list[str] = []
        self.buffer: EventBuffer[int] = EventBuffer(
            2,
            on_full=lambda: self.said.append("full"),
            on_drained=lambda: self.said.append("drained"),
            clock=lambda: self.now_s,
        )


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_events_come_out_in_order(rig: Rig) -> None:
    rig.buffer.extend(range(3))
    rig.buffer.extend((3,))
    assert [rig.buffer.take() for _ in range(4)] == [0, 1, 2, 3] and not rig.said


def test_it_is_full_once_and_drained_once_however_the_client_reads(rig: Rig) -> None:
    for _ in range(2):
        rig.said.clear()
        rig.buffer.extend(range(2 * PAUSE_AT - 1))
        assert not rig.said
        rig.buffer.extend(range(3))
        assert rig.said == ["full"]
        while len(rig.buffer) > 2 * RESUME_AT + 1:
            rig.buffer.take()
        rig.buffer.extend((0,))
        rig.buffer.take()
        assert rig.said == ["full"]
        rig.buffer.take()
        assert rig.said == ["full", "drained"]
        while rig.buffer:
            rig.buffer.take()


def test_a_client_has_so_long_to_read_from_a_full_buffer_and_every_event_starts_the_time_again(
    rig: Rig,
) -> None:
    rig.buffer.extend(range(2 * PAUSE_AT - 1))
    assert rig.buffer.unread_until_s is None
    rig.now_s = 200.0
    rig.buffer.extend((0,))
    assert rig.buffer.unread_until_s == 200.0 + UNREAD_TIMEOUT_S
    rig.now_s = 230.0
    rig.buffer.take()
    assert rig.buffer.unread_until_s == 230.0 + UNREAD_TIMEOUT_S
    while len(rig.buffer) > 2 * RESUME_AT:
        rig.buffer.take()
    assert rig.buffer.unread_until_s is None
