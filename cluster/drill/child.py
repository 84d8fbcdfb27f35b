"""A program that a drill starts, in a session of its own, by which everything that it starts can be told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import psutil

from cluster.drill.session import members
from moesaic.errors import Unavailable

END_TIMEOUT_S = 40.0
# Ray's processes learn of each other's end by looking.
AFTERMATH_S = 20.0
KILL_TIMEOUT_S = 5.0
_LOOK_S = 0.1
_LAST_LINES, _LAST_CHARACTERS = 5, 400
# Settings that a program was given in a file must not be overruled by the environment, which they come from.
_SETTINGS_PREFIX = "MOESAIC_"


class Child:
    """A running program. Its stdout is read line by line, its stderr goes to a file."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process
        self._log = log

    @classmethod
    async def start(cls, name: str, command: Sequence[str], folder: Path) -> Self:
        """Runs the command; what it says of itself goes to NAME.log in the folder."""
        log = folder / f"{name}.log"
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                env={key: value for key, value in os.environ.items() if not key.startswith(_SETTINGS_PREFIX)},
                start_new_session=True,
            )
        return cls(name, process, log)

    @property
    def has_ended(self) -> bool:
        return self._process.returncode is not None

    async def first_line(self, timeout_s: float) -> str:
        """The line by which it says that it is ready. Raises Unavailable when it ends, or says nothing in time."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                line = (await self._process.stdout.readline()).decode().strip()
        except TimeoutError as error:
            raise Unavailable(
                f"{self.name} is not ready after {timeout_s:.0f} s: {self.last_words()}"
            ) from error
        if not line:
            raise Unavailable(f"{self.name} ended before it was ready: {self.last_words()}")
        return line

    def last_words(self) -> str:
        """The end of what it wrote to stderr, in one line."""
        return " | ".join(self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:])[
            -_LAST_CHARACTERS:
        ]

    def members(self) -> list[psutil.Process]:
        """Every process of its session that is alive, itself included."""
        return members(self.pid)

    async def end(self) -> int:
        """Asks it to stop, and kills what has not ended in time. Returns how many had to be killed."""
        if not self.has_ended:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_TIMEOUT_S):
                    # `wait` would wait for those, too, that have inherited its stdout.
                    while not self.has_ended:
                        await asyncio.sleep(_LOOK_S)
        left = await self._left()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        await asyncio.to_thread(psutil.wait_procs, left, KILL_TIMEOUT_S)
        await self._process.wait()
        return len(left)

    async def _left(self) -> list[psutil.Process]:
        """The members that are still there when they had their time to end."""
        deadline_s = asyncio.get_running_loop().time() + AFTERMATH_S
        while (left := self.members()) and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(_LOOK_S)
        return left
