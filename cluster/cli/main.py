"""The entry point of the `moesaic` command. It says how a missing package is installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cluster.processes.search_path import leave_out_working_directory

OWN_PACKAGES = frozenset({"cluster", "expert_worker", "gateway", "moesaic", "router"})
# Packages that only `moesaic bench` needs.
BENCH_PACKAGES = frozenset({"aiohttp", "matplotlib"})


def main() -> None:
    """Runs one verb and exits with 0 (done), 1 (failed) or 2 (bad input)."""
    leave_out_working_directory()
    if _starts_a_server(sys.argv[1:]):
        print("Moesaic: starting", file=sys.stderr, flush=True)
    try:
        from moesaic.garbage import lasting_imports

        with lasting_imports():
            from cluster.cli.commands import app

        app()
    except KeyboardInterrupt:  # before the verb has its own signal handlers
        sys.exit(1)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in OWN_PACKAGES:
            raise
        server = "'.[bench]'" if package in BENCH_PACKAGES else "."
        print(
            f"error: the command needs {package}; from a checkout: pip install ./moesaic {server}",
            file=sys.stderr,
        )
        sys.exit(1)


def _starts_a_server(arguments: Sequence[str]) -> bool:
    """Whether to say so at once, before imports that take half a second. Who asks for JSON or help gets only that."""
    return arguments[:1] == ["serve"] and not {"--json", "--help", "-h"} & set(arguments)


if __name__ == "__main__":
    main()
