"""The verbs and their flags. What a verb does lies in its own module, imported when it is called.

Exit codes: 0 done, 1 failed, 2 bad input. A client verb imports neither ray nor torch.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.exit_codes import exit_with_code

DEFAULT_ROUTER = "127.0.0.1:50051"

app = typer.Typer(
    help="Serve mixture-of-experts models with every expert as a service.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Router = Annotated[str, typer.Option("--grpc", metavar="HOST:PORT", help="The router to ask.")]
Address = Annotated[
    str | None, typer.Option(metavar="HOST:PORT|auto", help="The Ray to join.", show_default="a local one")
]
DenseLayers = Annotated[
    str | None,
    typer.Option(help="auto, router or experts: who computes layers without a gate."),
]


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if show:
        from moesaic import __version__

        typer.echo(f"moesaic {__version__}")
        raise typer.Exit


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Argument(help="Folder of a model.", show_default="the demo model")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Expert workers.", show_default="one per node and GPU")
    ] = None,
    routers: Annotated[int | None, typer.Option(help="Routers that share the workers.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Copies of every expert.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    dense_layers: DenseLayers = None,
    expert_dtype: Annotated[str | None, typer.Option(help="auto, fp32, bf16, int8 or int4.")] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="Tokens do not depend on what else is in the batch.")
    ] = False,
    http_port: Annotated[int | None, typer.Option(help="Port of the OpenAI API; 0: a free one.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port of the first router; 0: a free one.")] = None,
    host: Annotated[str | None, typer.Option(help="Address that both listen on.")] = None,
    address: Address = None,
    config: Annotated[Path | None, typer.Option(help="Settings in YAML.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name in the API.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence, in tokens.")] = None,
    as_json: Json = False,
) -> None:
    """Serve a model until Ctrl-C; prints `ready http=HOST:PORT grpc=HOST:PORT` when it answers."""
    with exit_with_code(as_json=as_json):
        from cluster.launch import serve as serving
        from moesaic.settings import load_settings

        settings = load_settings(
            config,
            model=model,
            device=device,
            dtype=dtype,
            dense_layers=dense_layers,
            http_port=http_port,
            grpc_port=grpc_port,
            host=host,
            served_model_name=served_model_name,
            engine={"max_model_len": max_model_len, "batch_invariant": batch_invariant or None},
            worker={"expert_dtype": expert_dtype, "batch_invariant": batch_invariant or None},
            cluster={"workers": workers, "routers": routers, "replicas": replicas, "address": address},
        )
        checked = serving.check_model(settings)
        asyncio.run(serving.serve(serving.with_ports(settings), checked, as_json=as_json))


@app.command()
def inspect(
    model: Annotated[
        str | None, typer.Argument(help="Folder of a model.", show_default="the demo model")
    ] = None,
    dense_layers: DenseLayers = None,
    as_json: Json = False,
) -> None:
    """Show what is in a model's folder, what it takes, and whether it will serve."""
    with exit_with_code(as_json=as_json):
        from cluster.cli.inspect import run_inspect
        from moesaic.settings import load_settings

        settings = load_settings(model=model, dense_layers=dense_layers)
        run_inspect(settings.model, settings.dense_layers, as_json=as_json)


@app.command()
def demo(
    prompt: Annotated[str | None, typer.Option(help="What the model goes on from.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Length of the answer.", min=1)] = 110,
    workers: Annotated[int, typer.Option(help="Expert workers.", min=1)] = 4,
    routers: Annotated[int, typer.Option(help="Routers that share them.", min=1, max=64)] = 1,
    as_json: Json = False,
) -> None:
    """Start a cluster on the built-in model, stream an answer, show who computed what, and end."""
    with exit_with_code(as_json=as_json):
        from cluster.cli.demo import run_demo

        asyncio.run(
            run_demo(prompt, max_tokens=max_tokens, workers=workers, routers=routers, as_json=as_json)
        )


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the model goes on from.")],
    grpc: Router = DEFAULT_ROUTER,
    max_tokens: Annotated[int | None, typer.Option(help="Length of the answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="In (0, 1].")] = None,
    seed: Annotated[int | None, typer.Option(help="For a repeatable answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="The answer ends before this; repeat it.")] = None,
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
def stop(address: Address = None, as_json: Json = False) -> None:
    """End what a `moesaic serve` that was killed has left on a Ray that it had joined."""
    with exit_with_code(as_json=as_json):
        from cluster.cli.stop import run_stop

        asyncio.run(run_stop(address, as_json=as_json))


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(help="A model whose weights are pickles: .pth, .pt or .bin.")],
    out: Annotated[
        Path, typer.Argument(help="The Hugging Face folder to write; goes on with one that was begun.")
    ],
    shard_mib: Annotated[int, typer.Option(help="Size of its files of weights, in MiB.", min=1)] = 4096,
    as_json: Json = False,
) -> None:
    """Write a model of pickles as an ordinary Hugging Face folder, in safetensors."""
    with exit_with_code(as_json=as_json):
        from cluster.cli.convert import run_convert

        run_convert(folder, out, shard_mib=shard_mib, as_json=as_json)


@app.command()
def bench(
    model: Annotated[
        str | None, typer.Argument(help="Folder of a model.", show_default="the demo model")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(metavar="http://HOST:PORT", help="A server that runs, instead of a new cluster."),
    ] = None,
    grpc: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="With --url: one of its routers.", show_default=DEFAULT_ROUTER
        ),
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Streams at once, each a row.", show_default="1,4,16,64"),
    ] = None,
    rate: Annotated[
        str | None, typer.Option(metavar="R,R", help="Requests a second that arrive by chance, each a row.")
    ] = None,
    prompt_len: Annotated[str, typer.Option(metavar="N|N-M", help="Tokens of a prompt.")] = "128",
    output_len: Annotated[str, typer.Option(metavar="N|N-M", help="Tokens of an answer.")] = "64",
    shared_prefix: Annotated[int, typer.Option(help="Tokens that all prompts begin with.", min=0)] = 0,
    requests: Annotated[int | None, typer.Option(help="Requests of each row.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, lengths and arrivals.")] = 0,
    against: Annotated[
        str | None, typer.Option(metavar="transformers", help="Compare with it in one process, in turn.")
    ] = None,
    pairs: Annotated[int, typer.Option(help="How often both sides take their turn.", min=1)] = 5,
    workers: Annotated[
        int | None, typer.Option(help="Expert workers.", show_default="one per node and GPU")
    ] = None,
    routers: Annotated[int | None, typer.Option(help="Routers that share the workers.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    expert_dtype: Annotated[str | None, typer.Option(help="auto, fp32, bf16, int8 or int4.")] = None,
    address: Address = None,
    config: Annotated[Path | None, typer.Option(help="Settings in YAML.")] = None,
    chart: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the results.")] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON here too.")] = None,
    as_json: Json = False,
) -> None:
    """Measure throughput and latency through the API, and where the time goes."""
    with exit_with_code(as_json=as_json):
        from cluster.bench.bench import Outputs, bench_own_cluster, bench_server, make_plan
        from moesaic.errors import InvalidArgument
        from moesaic.settings import load_settings

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
        own = (model, workers, routers, device, dtype, expert_dtype, address, config)
        if url is not None:
            if any(flag is not None for flag in own):
                raise InvalidArgument("url: is of a server that runs: no flag can change that", field="url")
            asyncio.run(bench_server(url, grpc or DEFAULT_ROUTER, plan, outputs))
            return
        if grpc is not None:
            raise InvalidArgument("grpc: is of a server that runs: --url says which", field="grpc")
        settings = load_settings(
            config,
            model=model,
            device=device,
            dtype=dtype,
            http_port=0,
            grpc_port=0,
            log_level="ERROR",
            worker={"expert_dtype": expert_dtype},
            cluster={"workers": workers, "routers": routers, "address": address},
        )
        asyncio.run(bench_own_cluster(settings, plan, outputs))


@app.command()
def top(
    grpc: Router = DEFAULT_ROUTER,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1, max=3600.0)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one look and end.")] = False,
    as_json: Json = False,
) -> None:
    """Watch a cluster work: tokens a second, queues, and what every worker does."""
    with exit_with_code(as_json=as_json):
        from cluster.cli.top import run_top

        asyncio.run(run_top(grpc, interval_s=interval, once=once, as_json=as_json))
