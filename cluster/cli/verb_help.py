"""What the options and the help of all verbs have in common."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def examples(*lines: str) -> str:
    """The end of a verb's help. A line of its own needs an empty one before it."""
    return "\n\n".join(("Examples:", *(f"$ {line}" for line in lines)))
