"""`moesaic top`: the activity of a cluster, refreshed once a second; q or Ctrl-C ends it.

Without a terminal, and with --once or --json, it prints the activity of one interval. When the server does
not answer, the view says so, and the server is asked again until it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from dataclasses import replace

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from cluster.cli.top_view import Look, draw_look, plain_look
from cluster.observation.activity import activity_between
from cluster.observation.observer import Observation, Observer
from moesaic.errors import MoesaicError
from moesaic.stop_signals import StopSignals

_KEYS_AT_ONCE = 64


async def run_top(target: str, *, interval_s: float, once: bool, as_json: bool) -> None:
    """Raises MoesaicError when a single look is taken and no router answers."""
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with StopSignals() as signals:
        async with Observer(target) as observer:
            if on_terminal and not once and not as_json:
                await _watch(target, observer, interval_s, signals)
                return
            look = await signals.unless_stopped(_look_once(target, observer, interval_s))
    if as_json:
        print(json.dumps(plain_look(look)))
    else:
        Console(highlight=False).print(draw_look(look))


async def _look_once(target: str, observer: Observer, interval_s: float) -> Look:
    before = await observer.observe()
    await asyncio.sleep(interval_s)
    after = await observer.observe()
    return Look(target, after, activity_between(before, after))


async def _watch(target: str, observer: Observer, interval_s: float, signals: StopSignals) -> None:
    view = TopView(target)
    screen = Live(screen=True, auto_refresh=False)
    with _key_pressed("q", signals.stop.set), screen:
        while not signals.stop.is_set():
            try:
                view.see(await observer.observe())
            except MoesaicError as error:
                view.miss(error.message)
            screen.update(view.drawn(), refresh=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(signals.stop.wait(), interval_s)


class TopView:
    """The content of the screen: the newest look, and how long the server has not answered since."""

    def __init__(self, target: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._target = target
        self._clock = clock
        self._before: Observation | None = None
        self._look: Look | None = None
        self._lost_since_s: float | None = None
        self._lost = ""

    def see(self, now: Observation) -> None:
        before = now if self._before is None else self._before
        self._look = Look(self._target, now, activity_between(before, now))
        self._before, self._lost_since_s, self._lost = now, None, ""

    def miss(self, why: str) -> None:
        """Records that the server did not answer. Activity is counted anew from the next look on."""
        if self._lost_since_s is None:
            self._lost_since_s = self._clock()
        away_s = self._clock() - self._lost_since_s
        self._before, self._lost = None, f"{why} {away_s:.0f} s so far, trying again"

    def drawn(self) -> RenderableType:
        if self._look is None:
            return Text(self._lost, style="bold red")
        return draw_look(replace(self._look, lost=self._lost))


@contextlib.contextmanager
def _key_pressed(key: str, act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` when `key` is pressed. Inside the context the terminal delivers keys without Enter."""
    terminal, loop = sys.stdin.fileno(), asyncio.get_running_loop()

    def read() -> None:
        if key in os.read(terminal, _KEYS_AT_ONCE).decode(errors="replace").lower():
            act()

    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    loop.add_reader(terminal, read)
    try:
        yield
    finally:
        loop.remove_reader(terminal)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
