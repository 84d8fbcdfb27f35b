"""When the head of a local Ray is started again."""

from __future__ import annotations

import asyncio

from cluster.processes.ray_head import CALM_S, FIRST_PAUSE_S, LONGEST_PAUSE_S, HeadWatch, next_pause_s


class FakeHead:
    """Dies when a test says so; its start can fail as well."""

    def __init__(self) -> None:
        self.alive = True
        self.starts = 0
        self.error: OSError | None = None

    def is_alive(self) -> bool:
        return self.alive

    async def start(self) -> None:
        self.starts += 1
        if self.error is not None:
            raise self.error
        self.alive = True


class Scene:
    def __init__(self) -> None:
        self.now_s = 1000.0
        self.head = FakeHead()
        self.watch = HeadWatch(self.head, lambda: self.now_s)

    def look_after(self, s: float) -> None:
        self.now_s += s
        asyncio.run(self.watch.look())


def test_a_head_that_lives_is_left_alone() -> None:
    scene = Scene()
    for _ in range(100):
        scene.look_after(1.0)
    assert scene.head.starts == 0


def test_a_dead_head_is_started_once_its_pause_is_over() -> None:
    scene = Scene()
    scene.head.alive = False
    scene.look_after(CALM_S)
    scene.look_after(FIRST_PAUSE_S / 2)
    assert scene.head.starts == 0
    scene.look_after(FIRST_PAUSE_S / 2)
    assert (scene.head.starts, scene.head.alive) == (1, True)
    scene.look_after(1.0)
    assert scene.head.starts == 1


def test_a_head_that_cannot_be_started_is_tried_for_ever_but_seldom() -> None:
    scene = Scene()
    scene.head.alive = False
    scene.head.error = OSError("no space left")
    for _ in range(3600):
        scene.look_after(1.0)
    assert 3600 / (LONGEST_PAUSE_S + 2) <= scene.head.starts <= 3600 / LONGEST_PAUSE_S + 12
    scene.head.error = None
    for _ in range(int(LONGEST_PAUSE_S) + 2):
        scene.look_after(1.0)
    assert scene.head.alive


def test_the_pause_doubles_up_to_a_bound_and_a_calm_time_resets_it() -> None:
    pauses, pause_s = [], 0.0
    for _ in range(12):
        pause_s = next_pause_s(pause_s, lived_s=0.5)
        pauses.append(pause_s)
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == LONGEST_PAUSE_S
    assert next_pause_s(pauses[-1], lived_s=CALM_S) == FIRST_PAUSE_S
