"""The verbs and their options. What a verb does is in a module of its own, imported when the verb is called.

Exit codes: 0 done, 1 failed, 2 bad input. A client verb imports neither ray nor torch.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from moesaic.exit_codes import exit_with_code
from moesaic.options import FIELDS, SettingFlags, default_words, with_settings

DEFAULT_ROUTER = "127.0.0.1:50051"
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
    "cluster.address",
)

app = typer.Typer(
    help="Serve mixture-of-experts models with every expert as a service.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Model = Annotated[
    str | None,
    typer.Argument(help=FIELDS["model"].description, show_default=default_words(FIELDS["model"])),
]
Router = Annotated[str, typer.Option("--grpc", metavar="HOST:PORT", help="The router to ask.")]


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if show:
        from moesaic import __version__

        typer.echo(f"moesaic {__version__}")
        raise typer.Exit


@app.command()
@with_settings(*OF_A_CLUSTER, "http_port", "grpc_port", "host", "served_model_name")
def serve(model: Model = None, *, flags: SettingFlags, as_json: Json = False) -> None:
    """Serve a model until Ctrl-C; prints `ready http=HOST:PORT grpc=HOST:PORT` when it answers."""
    with exit_with_code(as_json=as_json):
        from cluster.launch import serve as serving

        settings = flags.load(model=model)
        checked = serving.check_model(settings)
        asyncio.run(serving.serve(serving.with_ports(settings), checked, as_json=as_json))


@app.command()
@with_settings("dense_layers", "dtype", "worker.expert_dtype", "cluster.routers", "cluster.replicas")
def inspect(
    model: Annotated[
        str | None, typer.Argument(help="A local folder of a model.", show_default="the demo model")
    ] = None,
    *,
    flags: SettingFlags,
    as_json: Json = False,
) -> None:
    """Show what a model's folder holds, how much memory it takes, and whether it can be served."""
    with exit_with_code(as_json=as_json):
        from cluster.cli.inspect import run_inspect

        settings = flags.load(model=model)
        run_inspect(settings.model, settings, as_json=as_json)


@app.command()
@with_settings(*OF_A_CLUSTER, defaults={"workers": 4, "routers": 1, "replicas": 1})
def demo(
    prompt: Annotated[str | None, typer.Option(help="The text that the model continues.")] = None,
    max_tokens: Annotated[int, typer.Option(help="The length of the answer, in tokens.", min=1)] = 110,
    *,
    flags: SettingFlags,
    as_json: Json = False,
) -> None:
    """Start a cluster on the built-in model, stream an answer, show which worker computed what, and end."""
    with exit_with_code(as_json=as_json):
        from cluster.cli.demo import run_demo

        settings = flags.load(http_port=0, grpc_port=0, log_level="ERROR")
        asyncio.run(run_demo(prompt, settings, max_tokens=max_tokens, as_json=as_json))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text that the model continues.")],
    grpc: Router = DEFAULT_ROUTER,
    max_tokens: Annotated[int | None, typer.Option(help="The length of the answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="The sampling temperature; 0 is greedy.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus sampling: the share of probability that is kept, in (0, 1].")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the answer repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string before which the answer ends; repeat it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Stream a continuation of a prompt."""
    with exit_with_code(as_json=as_json):
        from cluster.cli.generate import run_generate

        asyncio.run(
            run_generate(
                grpc,
                prompt,
                as_json=as_json,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                stop=stop,
            )
        )


@app.command()
def status(grpc: Router = DEFAULT_ROUTER, as_json: Json = False) -> None:
    """Show the processes of a cluster, their states, and what they have done."""
    with exit_with_code(as_json=as_json):
        from cluster.cli.status import run_status

        asyncio.run(run_status(grpc, as_json=as_json))


@app.command()
@with_settings("cluster.address")
def stop(*, flags: SettingFlags, as_json: Json = False) -> None:
    """End the processes that a killed `moesaic serve` left behind on a Ray cluster that it had joined."""
    with exit_with_code(as_json=as_json):
        from cluster.cli.stop import run_stop

        asyncio.run(run_stop(flags.load(), as_json=as_json))


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(help="A model whose weights are pickles: .pth, .pt or .bin.")],
    out: Annotated[
        Path, typer.Argument(help="The Hugging Face folder to write; a folder that was begun is completed.")
    ],
    shard_mib: Annotated[int, typer.Option(help="The size of each file of weights, in MiB.", min=1)] = 4096,
    as_json: Json = False,
) -> None:
    """Write a model of pickles as an ordinary Hugging Face folder, in safetensors."""
    with exit_with_code(as_json=as_json):
        from cluster.cli.convert import run_convert

        run_convert(folder, out, shard_mib=shard_mib, as_json=as_json)


@app.command()
@with_settings(*OF_A_CLUSTER)
def bench(
    model: Model = None,
    *,
    url: Annotated[
        str | None,
        typer.Option(metavar="http://HOST:PORT", help="A running server, instead of a new cluster."),
    ] = None,
    grpc: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="With --url: one of its routers.", show_default=DEFAULT_ROUTER
        ),
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Concurrent streams, a row for each.", show_default="1,4,16,64"),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(metavar="R,R", help="Requests a second, arriving at random, a row for each."),
    ] = None,
    prompt_len: Annotated[str, typer.Option(metavar="N|N-M", help="Tokens of a prompt.")] = "128",
    output_len: Annotated[str, typer.Option(metavar="N|N-M", help="Tokens of an answer.")] = "64",
    shared_prefix: Annotated[int, typer.Option(help="Tokens that all prompts begin with.", min=0)] = 0,
    requests: Annotated[int | None, typer.Option(help="Requests of each row.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="The seed of prompts, lengths and arrivals.")] = 0,
    against: Annotated[
        str | None,
        typer.Option(metavar="transformers", help="Compare with transformers in one process, in turn."),
    ] = None,
    pairs: Annotated[int, typer.Option(help="How often each side takes its turn.", min=1)] = 5,
    flags: SettingFlags,
    chart: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the results.")] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the JSON to a file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure throughput and latency through the API, and where the time goes."""
    with exit_with_code(as_json=as_json):
        from cluster.bench.bench import Outputs, bench_own_cluster, bench_server, make_plan
        from moesaic.errors import InvalidArgument

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
            asyncio.run(bench_server(url, grpc or DEFAULT_ROUTER, plan, outputs))
            return
        if grpc is not None:
            raise InvalidArgument(
                "grpc: names a router of a running server: give its --url too", field="grpc"
            )
        settings = flags.load(model=model, http_port=0, grpc_port=0, log_level="ERROR")
        asyncio.run(bench_own_cluster(settings, plan, outputs))


@app.command()
def top(
    grpc: Router = DEFAULT_ROUTER,
    interval: Annotated[float, typer.Option(help="Seconds between two updates.", min=0.1, max=3600.0)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one view and end.")] = False,
    as_json: Json = False,
) -> None:
    """Watch a cluster work: tokens a second, queues, and what every worker does."""
    with exit_with_code(as_json=as_json):
        from cluster.cli.top import run_top

        asyncio.run(run_top(grpc, interval_s=interval, once=once, as_json=as_json))
