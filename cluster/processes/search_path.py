"""Where Python looks for modules in the command and in all that it starts: never in the working directory.

`python -m`, an empty item in PYTHONPATH and Ray each put the working directory on the path. A file `router.py` or
`numpy.py` of somebody's own would then be run in place of a package.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence, Set
from pathlib import Path

# The folder that holds the packages of Moesaic.
HOME = str(Path(__file__).resolve().parents[2])


def leave_out_working_directory() -> None:
    """Changes `sys.path` of this process and, in the environment, that of the processes which it starts.

    The working directory stays where it holds this very program, or where PYTHONPATH names it in full.
    """
    named = [item for item in os.environ.get("PYTHONPATH", "").split(os.pathsep) if Path(item).is_absolute()]
    with contextlib.suppress(FileNotFoundError):  # a working directory that was removed holds no module
        if str(Path(sys.path[0]).absolute()) == HOME:  # not installed: run in the folder of its source
            sys.path[0] = HOME
            named = named if HOME in named else [*named, HOME]
        sys.path[:] = without(sys.path, Path.cwd(), {*named, HOME})
    os.environ["PYTHONPATH"] = os.pathsep.join(named)
    os.environ["PYTHONSAFEPATH"] = "1"


def without(path: Sequence[str], directory: Path, kept: Set[str]) -> list[str]:
    """`path` without the entries that mean `directory`, unless they are to be kept."""
    return [entry for entry in path if entry in kept or Path(entry).absolute() != directory]


def own_search_path() -> list[str]:
    """What a process elsewhere needs on its path to find these packages, where they are not installed."""
    return [HOME] if HOME in os.environ.get("PYTHONPATH", "").split(os.pathsep) else []
