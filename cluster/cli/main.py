"""The entry point of the `moesaic` command. It says how a missing package is installed."""

from __future__ import annotations

import sys

from cluster.processes.search_path import leave_out_working_directory

OWN_PACKAGES = frozenset({"cluster", "expert_worker", "gateway", "moesaic", "router"})
# Packages that only `moesaic bench` needs.
BENCH_PACKAGES = frozenset({"aiohttp", "matplotlib"})


def main() -> None:
    """Runs one verb and exits with 0 (done), 1 (failed) or 2 (bad input)."""
    leave_out_working_directory()
    try:
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


if __name__ == "__main__":
    main()
