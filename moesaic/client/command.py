"""The `moesaic` command: that of the server where it is installed, else the two verbs that need a client alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata

from moesaic.client.sync_client import SyncClient
from moesaic.exit_codes import exit_with_code
from moesaic.expert_policy import ON_MISSING, ExpertPolicy

DEFAULT_ROUTER = "127.0.0.1:50051"
DEFAULT_MAX_TOKENS = 128
_SERVER = "moesaic-server"
_ENTRY_POINTS = "moesaic.command"
_VERBS = ("generate", "status")


def main() -> None:
    """Exits with 0 (done), 1 (failed) or 2 (bad input)."""
    command = server_command() or client_command
    command()


def server_command(
    find: Callable[[str], metadata.Distribution] = metadata.distribution,
) -> Callable[[], None] | None:
    """The command that the distribution of the server declares; None without it."""
    try:
        declared = find(_SERVER).entry_points.select(group=_ENTRY_POINTS)
    except metadata.PackageNotFoundError:
        return None
    for entry in declared:
        command: Callable[[], None] = entry.load()
        return command
    return None


def client_command(arguments: Sequence[str] | None = None) -> None:
    """`moesaic generate` and `moesaic status`."""
    typed = sys.argv[1:] if arguments is None else arguments
    if typed and not typed[0].startswith("-") and typed[0] not in _VERBS:
        print(
            f"error: the client has no verb {typed[0]}: it has {' and '.join(_VERBS)}, and the others come"
            " with the server, moesaic-server",
            file=sys.stderr,
        )
        sys.exit(2)
    options = _parser().parse_args(typed)
    try:
        with exit_with_code(as_json=options.json), SyncClient(options.grpc) as client:
            options.run(client, options)
    except KeyboardInterrupt:
        sys.exit(130)


def _generate(client: SyncClient, options: argparse.Namespace) -> None:
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    wanted = {name: getattr(options, name) for name in ("max_tokens", "temperature", "top_p", "seed", "stop")}
    policy = ExpertPolicy(
        deny=options.deny, allow=options.allow, top_k=options.top_experts, on_missing=options.on_missing
    )
    if options.json:
        print(json.dumps(asdict(client.complete(prompt, experts=policy, **wanted))))
        return
    for token in client.generate(prompt, experts=policy, **wanted):
        print(token, end="", flush=True)
    print()


def _status(client: SyncClient, options: argparse.Namespace) -> None:
    model, stats = client.model_info(), client.router_stats()
    if options.json:
        print(json.dumps({"router": options.grpc, "model": asdict(model), "stats": asdict(stats)}))
        return
    print(f"{model.model} ({model.family}), epoch {model.epoch}, router {options.grpc}")
    print(
        f"context {model.max_model_len}; up {stats.uptime_s:.0f} s; {stats.generated_tokens} tokens generated"
    )
    parked = f", {stats.parked_sequences} wait for a missing expert" if stats.parked_sequences else ""
    print(f"{stats.running_sequences} running, {stats.waiting_sequences} waiting{parked}")
    for worker in stats.workers:
        state = "connected" if worker.connected else "not connected"
        print(f"{worker.worker} at {worker.address}: {state}, {worker.calls} calls, {worker.rows} rows")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moesaic",
        description="The client of Moesaic. The other verbs, such as `serve`, come with moesaic-server.",
    )
    parser.add_argument("--version", action="version", version=f"moesaic {metadata.version('moesaic')}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    generate = verbs.add_parser("generate", help="stream a continuation of a prompt", allow_abbrev=False)
    generate.add_argument("prompt", help="the text that the model continues; - reads it from stdin")
    generate.add_argument(
        "--max-tokens",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help="the length of the answer in tokens (default: %(default)s)",
    )
    generate.add_argument(
        "--temperature", type=float, metavar="T", help="0 is greedy (default: the router's)"
    )
    generate.add_argument(
        "--top-p", type=float, metavar="P", help="the share of probability that is kept, in (0, 1]"
    )
    generate.add_argument("--seed", type=int, metavar="N", help="makes the answer repeatable")
    generate.add_argument(
        "--stop", action="append", metavar="TEXT", help="a string before which the answer ends; repeat it"
    )
    generate.add_argument(
        "--deny",
        action="append",
        default=[],
        metavar="NAME",
        help="a bundle, a tag, or LAYER:SLOT whose experts compute nothing of the answer; repeat it",
    )
    generate.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="NAME",
        help="the only bundle or tag whose added experts may be used; repeat it for several",
    )
    generate.add_argument(
        "--top-experts", type=int, metavar="K", help="the most experts that compute a token"
    )
    generate.add_argument(
        "--on-missing",
        choices=ON_MISSING,
        help="what happens where no copy of an expert is left (default: the server's)",
    )
    _add_common(generate, _generate)
    _add_common(verbs.add_parser("status", help="show what a router has done", allow_abbrev=False), _status)
    return parser


def _add_common(verb: argparse.ArgumentParser, run: Callable[[SyncClient, argparse.Namespace], None]) -> None:
    verb.add_argument(
        "--grpc", default=DEFAULT_ROUTER, metavar="HOST:PORT", help="the router to ask (default: %(default)s)"
    )
    verb.add_argument("--json", action="store_true", help="print JSON instead of text")
    verb.set_defaults(run=run)
