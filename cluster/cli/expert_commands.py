"""The verbs of `moesaic expert` and their options. What a verb does is in a module of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.router_address import router_address
from cluster.cli.verb_help import Json, examples
from moesaic.errors import InvalidArgument
from moesaic.exit_codes import exit_with_code
from moesaic.options import HELP_OPTIONS, SettingFlags, with_settings
from moesaic.spelling import Spelling

if TYPE_CHECKING:
    from cluster.cli.expert_change import Reach

expert = typer.Typer(
    help="Change single experts of a model while it answers.",
    context_settings=HELP_OPTIONS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Examples:\n\n$ moesaic expert swap ./legal-v2\n\n$ moesaic expert history",
)

Router = Annotated[
    str | None,
    typer.Option(
        "--grpc",
        metavar="HOST:PORT",
        help="A router of the cluster; by default the one that `moesaic serve` starts with the same settings.",
        show_default="host and grpc_port of the settings, 127.0.0.1:50051",
    ),
]
Controller = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="The controller itself.",
        show_default="the one that the router follows",
    ),
]
Epoch = Annotated[
    str | None,
    typer.Option(
        metavar="EPOCH",
        help="Change this epoch and no other: fails if another change came first.",
        show_default="the current one",
    ),
]
Bundle = Annotated[
    str,
    typer.Argument(metavar="BUNDLE", help="A bundle's folder, or the name or digest of one that is stored."),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The name or the digest of a stored bundle.")]


def _reach(grpc: str | None, controller: str | None, flags: SettingFlags) -> Reach:
    from cluster.cli.expert_change import Reach

    return Reach(router_address(grpc, flags.load()), controller)


@expert.command(
    epilog=examples(
        "moesaic expert pack ./finetuned --base ./mixtral --out ./legal-v2",
        "moesaic expert pack ./finetuned --base ./mixtral --layers 10-20 --slots 3 --out ./legal-v2",
        "moesaic expert pack ./two-experts --base ./flexolmo --out ./maths-v1 --sign key.pem",
    )
)
def pack(
    context: typer.Context,
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="The folder of a fine-tune of the base, or of a model with other experts."
        ),
    ],
    *,
    base: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="The model that the bundle is for.", show_default="none: it must be given"
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="The bundle's new folder.", show_default="none: it must be given"
        ),
    ],
    layers: Annotated[
        str | None, typer.Option(metavar="10-20", help="Only these layers.", show_default="all that differ")
    ] = None,
    slots: Annotated[
        str | None,
        typer.Option(metavar="3,5-7", help="Only these slots of the model.", show_default="all that differ"),
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            metavar="new|same",
            help="Into new slots, or in place of the slots with the same numbers.",
            show_default="same for slots of the base, new for others",
        ),
    ] = None,
    experts_only: Annotated[
        bool, typer.Option("--experts-only", help="Pack also if the fine-tune moved more than experts.")
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(help="The bundle's name: a-z, 0-9, dot, dash.", show_default="that of the folder"),
    ] = None,
    description: Annotated[str, typer.Option(help="What the experts are for.", show_default="none")] = "",
    licence: Annotated[str, typer.Option(help="The licence of the weights.", show_default="none")] = "",
    owner: Annotated[str, typer.Option(help="Whose they are.", show_default="none")] = "",
    tag: Annotated[
        list[str] | None,
        typer.Option(help="A word by which requests may deny them; repeat it.", show_default="none"),
    ] = None,
    sign: Annotated[
        Path | None,
        typer.Option(
            metavar="KEY.pem", help="An ed25519 key that vouches for the bundle.", show_default="none"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a bundle of the experts in which a model differs from its base.

    A folder of manifest.json and weights.safetensors: docs/bundles.md describes it. Tells layer by layer what differs,
    and refuses a fine-tune that moved more than experts.
    """
    with exit_with_code(as_json=as_json, spell=Spelling(context)):
        from cluster.bundles.order import Order
        from cluster.bundles.selection import Wanted, parse_into, parse_numbers
        from cluster.cli.expert_pack import run_pack

        wanted = Wanted(parse_numbers(layers, "layers"), parse_numbers(slots, "slots"), parse_into(into))
        order = Order(
            model,
            base,
            out,
            wanted,
            experts_only,
            name,
            description,
            licence,
            owner,
            tuple(tag or ()),
        )
        run_pack(order, key=sign, as_json=as_json)


@expert.command(
    epilog=examples(
        "moesaic expert verify ./legal-v2 --base ./mixtral",
        "moesaic expert verify ./legal-v2 --signer key.pub.pem",
    )
)
def verify(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="FOLDER", help="The bundle's folder.")],
    *,
    base: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The model that it is for.", show_default="not compared"),
    ] = None,
    signer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="A public key, as a PEM file or in base64, that must have signed it; repeat it for several.",
            show_default="any",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check all of a bundle to its last byte, without a cluster."""
    with exit_with_code(as_json=as_json, spell=Spelling(context)):
        from cluster.cli.expert_pack import run_verify

        run_verify(bundle, base, signer, as_json=as_json)


@expert.command(epilog=examples("moesaic expert swap ./legal-v2", "moesaic expert swap legal-v1"))
@with_settings()
def swap(
    bundle: Bundle,
    *,
    grpc: Router = None,
    controller: Controller = None,
    expected_epoch: Epoch = None,
    flags: SettingFlags,
    as_json: Json = False,
) -> None:
    """Replace experts by those of a bundle, all at once, while the model answers."""
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.cli.expert_change import open_here, run_bundle_change

        found = open_here(bundle, "swap")
        reach = _reach(grpc, controller, flags)
        asyncio.run(
            run_bundle_change(found, reach, verb="swap", expected_epoch=expected_epoch or "", as_json=as_json)
        )


@expert.command(
    epilog=examples(
        "moesaic expert canary ./legal-v2 --share 10%", "moesaic expert canary ./legal-v2 --shadow 5%"
    )
)
@with_settings()
def canary(
    bundle: Bundle,
    *,
    share: Annotated[
        str, typer.Option(metavar="10%", help="The share of requests that the new experts compute.")
    ] = "10%",
    shadow: Annotated[
        str,
        typer.Option(
            metavar="5%", help="The share of other rows that they compute as well, only to be compared."
        ),
    ] = "0%",
    grpc: Router = None,
    controller: Controller = None,
    expected_epoch: Epoch = None,
    flags: SettingFlags,
    as_json: Json = False,
) -> None:
    """Try a bundle on a share of the requests. Then `promote` or `rollback`; it rolls back by itself when it fails."""
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.cli.expert_change import open_here, parse_share, run_bundle_change

        found = open_here(bundle, "canary")
        shares = parse_share(share, "share"), parse_share(shadow, "shadow")
        reach = _reach(grpc, controller, flags)
        asyncio.run(
            run_bundle_change(
                found,
                reach,
                verb="canary",
                expected_epoch=expected_epoch or "",
                share=shares[0],
                shadow=shares[1],
                as_json=as_json,
            )
        )


@expert.command(epilog=examples("moesaic expert promote"))
@with_settings()
def promote(
    *,
    grpc: Router = None,
    controller: Controller = None,
    expected_epoch: Epoch = None,
    flags: SettingFlags,
    as_json: Json = False,
) -> None:
    """Make the canary the model for all requests."""
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.cli.expert_change import run_change
        from moesaic.v1 import control_pb2

        request = control_pb2.ChangeRequest(
            kind=control_pb2.CHANGE_KIND_PROMOTE, expected_epoch=expected_epoch or ""
        )
        reach = _reach(grpc, controller, flags)
        asyncio.run(run_change(request, reach, as_json=as_json))


@expert.command(epilog=examples("moesaic expert rollback", "moesaic expert rollback 3f9a61c04be27d15"))
@with_settings()
def rollback(
    epoch: Annotated[
        str | None,
        typer.Argument(
            metavar="EPOCH",
            help="The epoch to go back to.",
            show_default="ends a canary, or else the one before",
        ),
    ] = None,
    *,
    grpc: Router = None,
    controller: Controller = None,
    expected_epoch: Epoch = None,
    flags: SettingFlags,
    as_json: Json = False,
) -> None:
    """Go back: end a canary, or return to an earlier epoch."""
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.cli.expert_change import run_change
        from moesaic.v1 import control_pb2

        request = control_pb2.ChangeRequest(
            kind=control_pb2.CHANGE_KIND_ROLLBACK, epoch=epoch or "", expected_epoch=expected_epoch or ""
        )
        reach = _reach(grpc, controller, flags)
        asyncio.run(run_change(request, reach, as_json=as_json))


@expert.command(
    epilog=examples(
        "moesaic expert add ./maths-v1",
        "moesaic expert add ./maths-v1 --gate-from prompts.txt",
        "moesaic expert add ./maths-v1 --gate-mode arrow --base ./mixtral --yes",
    )
)
@with_settings()
def add(
    bundle: Bundle,
    *,
    gate_from: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts, one a line, of which gate rows are made; every fifth is held out to measure them.",
            show_default="the bundle's own rows",
        ),
    ] = None,
    gate_mode: Annotated[
        str | None,
        typer.Option(
            metavar="MODE",
            help="How rows are made: hidden, hidden_ffn, mean-activation or arrow.",
            show_default="hidden_ffn, with --gate-from",
        ),
    ] = None,
    gate_against: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Prompts whose mean is subtracted, one a line.", show_default="none"
        ),
    ] = None,
    gate_norm: Annotated[
        str,
        typer.Option(metavar="NORM", help="How rows are normalised: unit, layernorm or none."),
    ] = "unit",
    gate_temperature: Annotated[
        float, typer.Option(help="Divides the rows: below 1 the new experts are chosen more often.")
    ] = 1.0,
    base: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The model's folder, for arrow.", show_default="none"),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask before rows that were made go live.")
    ] = False,
    grpc: Router = None,
    controller: Controller = None,
    expected_epoch: Epoch = None,
    flags: SettingFlags,
    as_json: Json = False,
) -> None:
    """Add experts in new slots, with their gate rows, while the model answers."""
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.cli.expert_change import open_here, run_bundle_change

        found = open_here(bundle, "add")
        reach = _reach(grpc, controller, flags)
        if gate_from is None and gate_mode is None:
            if base is not None or gate_against is not None:
                raise InvalidArgument("gate_mode: is needed to make rows", field="gate_mode")
            asyncio.run(
                run_bundle_change(
                    found, reach, verb="add", expected_epoch=expected_epoch or "", as_json=as_json
                )
            )
            return
        from cluster.bundles.row_maker import order_rows
        from cluster.cli.expert_gate import run_add_with_rows

        order = order_rows(
            gate_mode or "hidden_ffn",
            gate_from,
            negative=gate_against,
            base=base,
            norm=gate_norm,
            temperature=gate_temperature,
        )
        asyncio.run(
            run_add_with_rows(
                found, order, reach, expected_epoch=expected_epoch or "", yes=yes, as_json=as_json
            )
        )


@expert.command(epilog=examples("moesaic expert remove maths-v1"))
@with_settings()
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The bundle that added the experts.")],
    *,
    grpc: Router = None,
    controller: Controller = None,
    expected_epoch: Epoch = None,
    flags: SettingFlags,
    as_json: Json = False,
) -> None:
    """Take away the experts that a bundle added."""
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.cli.expert_change import run_change
        from moesaic.v1 import control_pb2

        request = control_pb2.ChangeRequest(
            kind=control_pb2.CHANGE_KIND_REMOVE, name=name, expected_epoch=expected_epoch or ""
        )
        reach = _reach(grpc, controller, flags)
        asyncio.run(run_change(request, reach, as_json=as_json))


@expert.command("list", epilog=examples("moesaic expert list", "moesaic expert list --json"))
@with_settings()
def list_bundles(
    *, grpc: Router = None, controller: Controller = None, flags: SettingFlags, as_json: Json = False
) -> None:
    """List the bundles that the controller has, and where they are in use."""
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.cli.expert_view import run_list

        asyncio.run(run_list(_reach(grpc, controller, flags), as_json=as_json))


@expert.command(epilog=examples("moesaic expert show maths-v1"))
@with_settings()
def show(
    name: Name,
    *,
    grpc: Router = None,
    controller: Controller = None,
    flags: SettingFlags,
    as_json: Json = False,
) -> None:
    """Show what a stored bundle holds."""
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.cli.expert_view import run_show

        asyncio.run(run_show(name, _reach(grpc, controller, flags), as_json=as_json))


@expert.command(epilog=examples("moesaic expert forget maths-v1"))
@with_settings()
def forget(
    name: Name,
    *,
    grpc: Router = None,
    controller: Controller = None,
    flags: SettingFlags,
    as_json: Json = False,
) -> None:
    """Delete a stored bundle that the model does not need any more."""
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.cli.expert_forget import run_forget

        asyncio.run(run_forget(name, _reach(grpc, controller, flags), as_json=as_json))


@expert.command(epilog=examples("moesaic expert history", "moesaic expert history --limit 5 --json"))
@with_settings()
def history(
    *,
    limit: Annotated[int, typer.Option(help="At most so many decisions.", min=1, max=10_000)] = 20,
    grpc: Router = None,
    controller: Controller = None,
    flags: SettingFlags,
    as_json: Json = False,
) -> None:
    """Show what was changed, by whom and why, newest first."""
    with exit_with_code(as_json=as_json, spell=flags.spell):
        from cluster.cli.expert_view import run_history

        reach = _reach(grpc, controller, flags)
        asyncio.run(run_history(reach, limit=limit, as_json=as_json))
