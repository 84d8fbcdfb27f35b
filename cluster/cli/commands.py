"""The verbs and their options. What a verb does is in a module of its own, imported when the verb is called.

Exit codes: 0 done, 1 failed, 2 bad input. A client verb imports neither ray nor torch.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, cast

import typer

from cluster.cli.expert_commands import expert
from cluster.cli.router_address import router_address
from cluster.cli.verb_help import Json, examples
from moesaic.addresses import join_address, split_address
from moesaic.errors import InvalidArgument
from moesaic.exit_codes import exit_with_code
from moesaic.options import FIELDS, HELP_OPTIONS, SettingFlags, default_words, with_settings
from moesaic.spelling import Spelling

if TYPE_CHECKING:
    from moesaic.expert_policy import OnMissing

# The settings that every verb with a cluster of its own takes.
OF_A_CLUSTER = (
    "cluster.workers",
    "cluster.routers",
    "cluster.replicas",
    "device",
    "dtype",
    "worker.expert_dtype",
    "dense_layers",
    "engine.batch_invariant",
    "worker.batch_invariant",
    "engine.max_model_len",
    "engine.generation_config",
    "engine.on_missing",
    "cluster.address",
)

app = typer.Typer(
    help="Serve mixture-of-experts models with every expert as a service.",
    context_settings=HELP_OPTIONS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str | None,
    typer.Argument(help=FIELDS["model"].description, show_default=default_words(FIELDS["model"])),
]
Router = Annotated[
    str | None,
    typer.Option(
        "--grpc",
        metavar="HOST:PORT",
        help="The router to ask; by default the one that `moesaic serve` starts with the same settings.",
        show_default="host and grpc_port of the settings, 127.0.0.1:50051",
    ),
]
# The groups of verbs in the help.
_SERVE, _ASK = "Serve", "Ask and watch"
_NO_SUCH_VERB = {
    "run": "`moesaic serve MODEL` starts a server, `moesaic generate PROMPT` asks it",
    "chat": "a chat goes over HTTP, to /v1/chat/completions; `moesaic generate PROMPT` continues a text",
}


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if show:
        from moesaic import __version__

        typer.echo(f"moesaic {__version__}")
        raise typer.Exit


@app.command(
    rich_help_panel=_SERVE,
    epilog=examples(
        "moesaic serve",
        "moesaic serve hf://mistralai/Mixtral-8x7B-v0.1 --expert-dtype int8",
        "moesaic serve ./model --workers 4 --replicas 2 --http-port 8080",
    ),
)
@with_settings(
    *OF_A_CLUSTER,
    "http_port",
    "grpc_port",
    "host",
    "served_model_name",
    "cluster.state",
    "cluster.signers",
    "rollout.drain_s",
)
def serve(model: Model = None, *, flags: SettingFlags, as_json: Json = False) -> None:
    """Serve a model until Ctrl-C; prints `ready http=HOST:PORT grpc=HOST:PORT` when it answers."""
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.launch import serve as serving
        from cluster.launch.ports import with_ports

        settings = flags.load(model=model)
        checked = serving.check_model(settings)
        asyncio.run(serving.serve(with_ports(settings), checked, as_json=as_json))


@app.command(
    rich_help_panel=_SERVE,
    epilog=examples("moesaic inspect ./model", "moesaic inspect hf://ORG/NAME --json"),
)
@with_settings(
    "dense_layers",
    "dtype",
    "engine.generation_config",
    "worker.expert_dtype",
    "cluster.routers",
    "cluster.replicas",
)
def inspect(model: Model = None, *, flags: SettingFlags, as_json: Json = False) -> None:
    """Show what a model's folder holds, how much memory it takes, and whether it can be served."""
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.cli.inspect import run_inspect

        settings = flags.load(model=model)
        run_inspect(settings.model, settings, as_json=as_json)


@app.command(
    rich_help_panel=_SERVE, epilog=examples("moesaic demo", 'moesaic demo --prompt "JULIET:" --workers 8')
)
@with_settings(*OF_A_CLUSTER, defaults={"workers": 4, "routers": 1, "replicas": 2})
def demo(
    prompt: Annotated[
        str | None, typer.Option(help="The text that the model continues.", show_default="ROMEO:")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="The length of the answer, in tokens.", min=1)] = 110,
    *,
    flags: SettingFlags,
    as_json: Json = False,
) -> None:
    """Start a cluster on the built-in model, stream an answer, then stream it again while a worker is killed. Exits
    with 1 if the text differs."""
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.cli.demo import run_demo

        settings = flags.load(http_port=0, grpc_port=0, log_level="ERROR")
        asyncio.run(run_demo(prompt, settings, max_tokens=max_tokens, as_json=as_json))


@app.command(
    "demo-experts",
    rich_help_panel=_SERVE,
    epilog=examples("moesaic demo-experts", "moesaic demo-experts --json"),
)
@with_settings(*OF_A_CLUSTER, defaults={"workers": 2, "routers": 1, "replicas": 1, "batch_invariant": True})
def demo_experts(*, flags: SettingFlags, as_json: Json = False) -> None:
    """Start a cluster on the built-in model, add experts for arithmetic to it, make them better, refuse them, and take them
    away. Exits with 1 unless the model is then what it was, to the last bit."""
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.checkpoints.model_source import DEMO_MODEL
        from cluster.cli.demo_experts import run_demo_experts

        settings = flags.load(model=str(DEMO_MODEL), http_port=0, grpc_port=0, log_level="ERROR")
        asyncio.run(run_demo_experts(settings, as_json=as_json))


@app.command(
    rich_help_panel=_ASK,
    epilog=examples(
        'moesaic generate "Once upon a time" --temperature 0',
        "moesaic generate - --max-tokens 500 < story.txt",
        'echo "To be or" | moesaic generate --json',
        'moesaic generate "2+3=" --deny maths-v1 --deny 2:5',
    ),
)
@with_settings()
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="The text that the model continues; - reads it from standard input.",
            show_default="standard input, where something is piped into it",
        ),
    ] = None,
    *,
    grpc: Router = None,
    max_tokens: Annotated[int, typer.Option(help="The length of the answer, in tokens.")] = 128,
    temperature: Annotated[
        float | None,
        typer.Option(help="The sampling temperature; 0 is greedy.", show_default="the server's"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Nucleus sampling: the share of probability that is kept, in (0, 1].",
            show_default="the server's",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Makes the answer repeatable.", show_default="another one every time")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A string before which the answer ends; repeat it.", show_default="none"),
    ] = None,
    deny: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A bundle, a tag, or LAYER:SLOT whose experts compute nothing of the answer; repeat it.",
            show_default="none",
        ),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="The only bundle or tag whose added experts may be used; repeat it for several.",
            show_default="all",
        ),
    ] = None,
    top_experts: Annotated[
        int | None,
        typer.Option(metavar="K", help="The most experts that compute a token.", show_default="the model's"),
    ] = None,
    on_missing: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY",
            help="What happens where no copy of an expert is left: wait, fail, substitute or renormalise.",
            show_default="the server's",
        ),
    ] = None,
    flags: SettingFlags,
    as_json: Json = False,
) -> None:
    """Stream a continuation of a prompt."""
    from cluster.cli.generate import read_prompt, run_generate, spelled
    from moesaic import ExpertPolicy

    with exit_with_code(as_json=as_json, spell=spelled(flags.spell)):
        asyncio.run(
            run_generate(
                router_address(grpc, flags.load()),
                read_prompt(prompt, sys.stdin),
                as_json=as_json,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                stop=stop,
                experts=ExpertPolicy(
                    deny=deny or (),
                    allow=allow or (),
                    top_k=top_experts,
                    on_missing=cast("OnMissing | None", on_missing),  # the policy refuses other words
                ),
            )
        )


@app.command(
    rich_help_panel=_ASK, epilog=examples("moesaic status", "moesaic status --grpc 10.0.0.7:50051 --json")
)
@with_settings()
def status(*, grpc: Router = None, flags: SettingFlags, as_json: Json = False) -> None:
    """Show the processes of a cluster, their states, and what they have done."""
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.cli.status import run_status

        asyncio.run(run_status(router_address(grpc, flags.load()), as_json=as_json))


@app.command(rich_help_panel=_SERVE, epilog=examples("moesaic stop --address 10.0.0.7:6379"))
@with_settings("cluster.address", words={"address": "none: it must be given"})
def stop(*, flags: SettingFlags, as_json: Json = False) -> None:
    """End the processes that a killed `moesaic serve` left behind on a Ray cluster that it had joined."""
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.cli.stop import run_stop

        asyncio.run(run_stop(flags.load(), as_json=as_json))


@app.command(rich_help_panel=_SERVE, epilog=examples("moesaic convert ./Mixtral-8x7B-v0.1 ./mixtral"))
def convert(
    context: typer.Context,
    model: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A model whose weights are pickles: .pth, .pt or .bin.")
    ],
    out: Annotated[
        Path, typer.Argument(help="The Hugging Face folder to write; a half-written one is completed.")
    ],
    shard_mib: Annotated[int, typer.Option(help="The size of each file of weights, in MiB.", min=1)] = 4096,
    as_json: Json = False,
) -> None:
    """Write a model of pickles as an ordinary Hugging Face folder, in safetensors."""
    with exit_with_code(as_json=as_json, spell=Spelling(context)):
        from cluster.cli.convert import run_convert

        run_convert(model, out, shard_mib=shard_mib, as_json=as_json)


@app.command(
    rich_help_panel=_ASK,
    epilog=examples(
        "moesaic bench",
        "moesaic bench ./model --concurrency 1,8 --chart bench.png",
        "moesaic bench --url http://127.0.0.1:8000 --rate 2",
    ),
)
@with_settings(*OF_A_CLUSTER)
def bench(
    model: Model = None,
    *,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="http://HOST:PORT",
            help="A running server, instead of a new cluster.",
            show_default="a new cluster",
        ),
    ] = None,
    grpc: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="With --url: one of its routers.",
            show_default="host and grpc_port of the settings, 127.0.0.1:50051",
        ),
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Concurrent streams, a row for each.", show_default="1,4,16,64"),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="R,R",
            help="Requests a second, arriving at random, a row for each.",
            show_default="none",
        ),
    ] = None,
    prompt_len: Annotated[str, typer.Option(metavar="N|N-M", help="Tokens of a prompt.")] = "128",
    output_len: Annotated[str, typer.Option(metavar="N|N-M", help="Tokens of an answer.")] = "64",
    shared_prefix: Annotated[int, typer.Option(help="Tokens that all prompts begin with.", min=0)] = 0,
    requests: Annotated[
        int | None, typer.Option(help="Requests of each row.", min=1, show_default="by the row")
    ] = None,
    seed: Annotated[int, typer.Option(help="Repeats the same random prompts, lengths and times.")] = 0,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="transformers",
            help="Compare with transformers in one process, in turn.",
            show_default="nothing",
        ),
    ] = None,
    pairs: Annotated[int, typer.Option(help="How often each side takes its turn.", min=1)] = 5,
    flags: SettingFlags,
    chart: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the results.", show_default="none")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the JSON to a file.", show_default="none")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure throughput and latency through the API, and where the time goes."""
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.bench.bench import Outputs, bench_own_cluster, bench_server, make_plan

        plan = make_plan(
            concurrency=concurrency,
            rate=rate,
            prompt_len=prompt_len,
            output_len=output_len,
            shared_prefix=shared_prefix,
            requests=requests,
            seed=seed,
            against=against,
            pairs=pairs,
        )
        outputs = Outputs(as_json, save, chart)
        if url is not None:
            if model is not None or flags.any_given:
                raise InvalidArgument("url: names a running server, which no flag can change", field="url")
            asyncio.run(bench_server(url, router_address(grpc, flags.load()), plan, outputs))
            return
        if grpc is not None:
            raise InvalidArgument(
                "grpc: names a router of a running server: give its --url too", field="grpc"
            )
        settings = flags.load(model=model, http_port=0, grpc_port=0, log_level="ERROR")
        asyncio.run(bench_own_cluster(settings, plan, outputs))


@app.command(
    rich_help_panel=_SERVE,
    epilog=examples(
        "moesaic drill --fault kill --minutes 2",
        "moesaic drill --fault kill,freeze,router --seed 7 --chart drill.png",
        "moesaic drill --http 127.0.0.1:8000 --grpc 127.0.0.1:50051 --fault kill",
    ),
)
@with_settings(*OF_A_CLUSTER, defaults={"workers": 4, "routers": 1, "replicas": 2})
def drill(
    model: Model = None,
    *,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FAULT,FAULT",
            help="kill, freeze, slow, pair, partition, nan, router, controller, head, swap, cancel, overload, or all: "
            "a random mixture of those that a cluster of one host can have.",
            show_default="all",
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(help="Minutes of each fault, and as many of its control.")] = 2.0,
    seed: Annotated[int, typer.Option(help="The seed of faults, victims and prompts.")] = 0,
    streams: Annotated[int, typer.Option(help="Requests that run at once.", min=1, max=256)] = 8,
    http: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="A cluster that runs on this host. Its processes will be killed, stopped and slowed down.",
            show_default="a new cluster",
        ),
    ] = None,
    grpc: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="With --http: one of its routers.",
            show_default="host and grpc_port of the settings, 127.0.0.1:50051",
        ),
    ] = None,
    flags: SettingFlags,
    chart: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw tokens a second over time.", show_default="none"),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the JSON to a file.", show_default="none")
    ] = None,
    as_json: Json = False,
) -> None:
    """Kill, stop and starve processes of a cluster under load, beside a healthy control, and compare every token.

    Exits with 1 when a promise of docs/reliability.md does not hold.
    """
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.bench.bench import Outputs
        from cluster.drill import drill as drills

        faults, plan = drills.parse_faults(fault or ["all"]), drills.make_plan(minutes, seed, streams)
        outputs = Outputs(as_json, save, chart)
        if http is not None:
            if model is not None:
                raise InvalidArgument("http: names a running cluster, which has its model", field="http")
            url = f"http://{join_address(*split_address(http, 'http'))}"
            router = router_address(grpc, flags.load())
            holds = asyncio.run(drills.drill_running_cluster(url, router, faults, plan, outputs))
        elif grpc is not None:
            raise InvalidArgument(
                "grpc: names a router of a running cluster: give its --http too", field="grpc"
            )
        else:
            settings = flags.load(model=model, http_port=0, grpc_port=0, log_level="ERROR")
            holds = asyncio.run(drills.drill_own_clusters(settings, faults, plan, outputs))
        raise typer.Exit(0 if holds else 1)


@app.command(rich_help_panel=_ASK, epilog=examples("moesaic top", "moesaic top --once --json"))
@with_settings()
def top(
    *,
    grpc: Router = None,
    interval: Annotated[float, typer.Option(help="Seconds between two updates.", min=0.1, max=3600.0)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one view and end.")] = False,
    flags: SettingFlags,
    as_json: Json = False,
) -> None:
    """Watch a cluster work: tokens a second, queues, and what every worker does."""
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.cli.top import run_top

        asyncio.run(
            run_top(router_address(grpc, flags.load()), interval_s=interval, once=once, as_json=as_json)
        )


app.add_typer(expert, name="expert")


def _hint(verb: str, instead: str) -> Callable[[], NoReturn]:
    def refuse() -> NoReturn:
        with exit_with_code():
            raise InvalidArgument(f"there is no verb `{verb}`: {instead}", field="verb")
        raise AssertionError  # the context does not return after an error

    return refuse


for _verb, _instead in _NO_SUCH_VERB.items():
    app.command(
        _verb, hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
    )(_hint(_verb, _instead))
