"""Progress in stages: a line for each that ends where there is no terminal, bars where there is one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster.terminal.stage_progress import StageProgress


def test_a_stage_that_ends_is_a_line() -> None:
    out = io.StringIO()
    with StageProgress(Console(file=out)) as progress:
        progress.show("load", 1, 2, "1 of 2 experts")
        progress.show("load", 2, 2, "2 of 2 experts")
        progress.show("probe")
    assert out.getvalue() == "load: 2 of 2 experts\nprobe\n"


def test_a_stage_that_fails_does_not_look_done() -> None:
    out = io.StringIO()
    with pytest.raises(ValueError, match="no"), StageProgress(Console(file=out)) as progress:
        progress.show("load")
        progress.show("probe")
        raise ValueError("no")
    assert out.getvalue() == "load\n"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_bars_fit_the_terminal(width: int) -> None:
    out = io.StringIO()
    with StageProgress(Console(file=out, width=width, force_terminal=True, color_system=None)) as progress:
        progress.show("every router", 1, 2, "a long sentence about what happens in this stage " * 3)
    assert "every router" in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= width + len("\x1b[?25l") * 2
