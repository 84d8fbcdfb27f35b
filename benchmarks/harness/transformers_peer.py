"""Drives `peers/transformers_side.py`: a process of its own, with the environment that suits it best."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

SIDE = Path(__file__).resolve().parents[1] / "peers" / "transformers_side.py"
# Set for our processes because they share the cores; `transformers` has the machine to itself, and waits as it likes.
_OURS_ALONE = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


class TransformersPeer:
    """One command at a time; each answers a JSON object."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._stdin: IO[str] = process.stdin
        self._stdout: IO[str] = process.stdout
        self.pid = process.pid

    def choose(self, batch: int, prompt_length: int, *, for_prefill: bool = False) -> dict[str, Any]:
        """Finds and keeps the fastest way for this shape: `choice`, and `seconds` by choice."""
        return self._do(do="choose", batch=batch, prompt_length=prompt_length, for_prefill=for_prefill)

    def decode(self, prompts: Sequence[Sequence[int]], steps: int) -> dict[str, Any]:
        """`tokens_per_s` over the steps alone, and `token_ids` [batch][steps + 1]."""
        return self._do(do="decode", prompts=[list(prompt) for prompt in prompts], steps=steps)

    def prefill(self, prompt: Sequence[int]) -> dict[str, Any]:
        """`seconds` to the first token."""
        return self._do(do="prefill", prompt=list(prompt))

    def _do(self, **command: Any) -> dict[str, Any]:
        self._stdin.write(json.dumps(command) + "\n")
        self._stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        line = self._stdout.readline()
        if not line:
            raise SystemExit("the process of transformers ended: its error is above")
        reply: dict[str, Any] = json.loads(line)
        return reply


@contextmanager
def transformers_peer(
    model: Path,
    threads: int,
    side: Path = SIDE,
    arguments: Sequence[str] = (),
    variables: Mapping[str, str] = os.environ,
) -> Iterator[TransformersPeer]:
    """`arguments` are those that another `side` than the ordinary one has beyond its own."""
    environment = {key: value for key, value in variables.items() if key not in _OURS_ALONE}
    process = subprocess.Popen(
        [sys.executable, str(side), str(model), "--threads", str(threads), *arguments],
        env={**environment, "OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        peer = TransformersPeer(process)
        peer.answer()
        yield peer
    finally:
        process.terminate()
        process.wait(30)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
