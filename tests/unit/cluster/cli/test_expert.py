"""`moesaic expert`: what its verbs print, ask and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from support.bundles import make_bundle
from support.checkpoints import random_mixtral, write_mixtral
from support.played_controller import (
    STAGES,
    PlayedLifecycle,
    PlayedRouterControl,
    playing_lifecycle,
    stored,
)
from typer.testing import CliRunner

from cluster.bundles.row_maker import order_rows
from cluster.cli.commands import app
from cluster.cli.expert_change import Reach, open_here, parse_share, run_bundle_change, run_change
from cluster.cli.expert_forget import run_forget
from cluster.cli.expert_gate import run_add_with_rows
from cluster.cli.expert_view import run_history, run_list, run_show
from moesaic.bundles import Bundle, verify
from moesaic.errors import Aborted, Cancelled, FailedPrecondition, InvalidArgument, NotFound
from moesaic.v1 import control_pb2
from moesaic.v1 import inference_pb2 as pb

EPOCH, BEFORE = "2222222222222222", "1111111111111111"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixtral(tmp_path_factory.mktemp("base") / "mixtral")


@pytest.fixture
def bundle(tmp_path: Path, base: Path) -> Bundle:
    return make_bundle(tmp_path / "maths-v1", base, ((0, None), (1, None)))


@pytest.fixture
def legal(tmp_path: Path, base: Path) -> Bundle:
    return make_bundle(tmp_path / "legal-v2", base, ((0, 3), (1, 3)), name="legal-v2")


def ran(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["expert", *arguments], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> str:
    """The one line on stderr of a verb that must exit with 2."""
    result = CliRunner().invoke(app, ["expert", *arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr.strip()


def test_pack_tells_what_differs_and_what_comes_next(tmp_path: Path, base: Path) -> None:
    model = random_mixtral()
    model.model.layers[1].mlp.experts.down_proj.data[2] *= 1.5
    model.model.layers[1].mlp.gate.weight.data[2] *= 1.1
    model.save_pretrained(tmp_path / "tuned")
    out = tmp_path / "legal-v2"
    lines = ran("pack", str(tmp_path / "tuned"), "--base", str(base), "--out", str(out)).splitlines()
    assert lines[0].startswith("legal-v2: 1 expert for mixtral, ")
    assert lines[1] == "from a fine-tune of the base; 1 of 8 experts differ"
    assert lines[5].split() == ["1", "2", "slot", "2", "31", "%", "packed,", "moved", "10", "%"]
    assert lines[-1] == f"next: moesaic expert swap {out}"


def test_pack_signs_and_verify_tells_by_whom(tmp_path: Path, base: Path) -> None:
    key = tmp_path / "key.pem"
    private = Ed25519PrivateKey.generate()
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    model = random_mixtral()
    model.model.layers[1].mlp.experts.down_proj.data[2] *= 1.5
    model.save_pretrained(tmp_path / "tuned")
    out = tmp_path / "legal-v2"
    arguments = ("pack", str(tmp_path / "tuned"), "--base", str(base), "--out", str(out))
    packed = json.loads(ran(*arguments, "--sign", str(key), "--tag", "law", "--json"))
    assert (packed["signed"], packed["experts"][0]["slot"], packed["left_out"]) == (True, 2, [])
    text = ran("verify", str(out), "--base", str(base))
    assert private.public_key().public_bytes_raw().hex()[:16] in text
    assert json.loads(ran("verify", str(out), "--json"))["digest"] == packed["digest"]


def test_verify_names_the_reason(bundle: Bundle) -> None:
    data = bytearray(bundle.weights_file.read_bytes())
    data[-1] ^= 1
    bundle.weights_file.write_bytes(data)
    assert "not those that the manifest promises" in refused("verify", str(bundle.folder))
    result = CliRunner().invoke(app, ["expert", "verify", str(bundle.folder), "--json"])
    assert json.loads(result.stderr.splitlines()[-1])["error"]["reason"] == "BUNDLE_DIGEST"


def test_a_model_in_place_of_a_bundle_gets_the_sentence_that_helps(base: Path) -> None:
    assert "`moesaic expert pack FOLDER --base BASE --out BUNDLE` makes one of it" in refused(
        "swap", str(base)
    )


def test_a_bundle_of_the_other_kind_is_refused_before_anything_is_sent(bundle: Bundle, legal: Bundle) -> None:
    assert "`moesaic expert add` adds them" in refused("swap", str(bundle.folder))
    assert "`moesaic expert swap` does that" in refused("add", str(legal.folder))


@pytest.mark.parametrize(
    ("text", "share"), [("10%", 0.1), ("0.25", 0.25), ("0", 0.0), ("100%", 1.0), ("2.5%", 0.025)]
)
def test_shares_are_percentages_or_fractions(text: str, share: float) -> None:
    assert parse_share(text, "share") == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "ten", "110%", "-1%", "nan", "1.5"])
def test_other_shares_are_refused(text: str, bundle: Bundle) -> None:
    assert refused("canary", str(bundle.folder), "--share", text).startswith("error: --share")


async def test_a_swap_shows_the_new_epoch_and_the_way_back(
    legal: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    controller = PlayedLifecycle()
    async with playing_lifecycle(controller) as (router, _):
        await run_bundle_change(
            open_here(str(legal.folder), "swap"),
            Reach(router),
            verb="swap",
            expected_epoch="e",
            as_json=False,
        )
    request = controller.changes[0]
    assert (request.kind, request.bundle) == (control_pb2.CHANGE_KIND_SWAP, legal.digest)
    assert (request.expected_epoch, request.canary, "@" in request.operator) == ("e", False, True)
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith(f"epoch {EPOCH}, before {BEFORE}; ")
    assert out.splitlines()[1] == f"back: moesaic expert rollback {BEFORE}"
    shown = [line.partition(":")[0] for line in err.splitlines()]
    assert shown == [
        *("upload", "verify", "load beside", "probe", "publish", "commit", "every router", "drain", "unload")
    ]


async def test_a_canary_names_its_share_and_both_ways_on(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    controller = PlayedLifecycle()
    async with playing_lifecycle(controller) as (_, address):
        await run_bundle_change(
            bundle,
            Reach("127.0.0.1:1", address),
            verb="canary",
            share=0.1,
            shadow=0.05,
            as_json=False,
        )
    request = controller.changes[0]
    assert (request.kind, request.canary) == (control_pb2.CHANGE_KIND_ADD, True)
    assert (request.share, request.shadow_share) == (0.1, 0.05)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"canary: epoch {EPOCH} for 10% of requests, beside {BEFORE}; ")
    assert lines[1:] == ["then: moesaic expert promote", "back: moesaic expert rollback"]


async def test_json_has_every_stage(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    async with playing_lifecycle(PlayedLifecycle()) as (router, _):
        await run_bundle_change(bundle, Reach(router), verb="add", as_json=True)
    changed = json.loads(capsys.readouterr().out)
    assert (changed["epoch"], changed["previous_epoch"], changed["bundle"]) == (EPOCH, BEFORE, "maths-v1")
    assert len(changed["stages"]) == len(STAGES) - 1


async def test_a_stored_bundle_is_named_by_name_or_digest(bundle: Bundle, legal: Bundle) -> None:
    controller = PlayedLifecycle()
    for one in (bundle, legal):
        controller.bundles[one.digest] = stored(
            one.manifest.name, digest=one.digest, manifest=one.manifest_bytes
        )
    async with playing_lifecycle(controller) as (router, _):
        reach = Reach(router)
        await run_bundle_change("maths-v1", reach, verb="add", as_json=False)
        await run_bundle_change(legal.digest.hex()[:8], reach, verb="swap", as_json=False)
        with pytest.raises(InvalidArgument, match="moesaic expert add"):
            await run_bundle_change("maths-v1", reach, verb="swap", as_json=False)
        with pytest.raises(NotFound, match="it has: legal-v2, maths-v1"):
            await run_bundle_change("physics", reach, verb="add", as_json=False)
    assert [request.bundle for request in controller.changes] == [bundle.digest, legal.digest]
    assert controller.uploads == 0


async def test_two_bundles_of_one_name_are_told_apart_by_digest(bundle: Bundle) -> None:
    controller = PlayedLifecycle()
    for digest in (b"a" * 32, b"b" * 32):
        controller.bundles[digest] = stored("maths-v1", digest=digest, manifest=bundle.manifest_bytes)
    async with playing_lifecycle(controller) as (router, _):
        with pytest.raises(InvalidArgument, match="616161616161, 626262626262"):
            await run_bundle_change("maths-v1", Reach(router), verb="add", as_json=False)


async def test_the_operator_that_loses_is_told_the_current_epoch(legal: Bundle) -> None:
    controller = PlayedLifecycle(error=Aborted("the current epoch is 3333"), error_after=4)
    async with playing_lifecycle(controller) as (router, _):
        with pytest.raises(Aborted, match="3333"):
            await run_bundle_change(legal, Reach(router), verb="swap", as_json=False)


async def test_promote_rollback_and_remove_are_changes(capsys: pytest.CaptureFixture[str]) -> None:
    controller = PlayedLifecycle()
    requests = [
        control_pb2.ChangeRequest(kind=control_pb2.CHANGE_KIND_PROMOTE),
        control_pb2.ChangeRequest(kind=control_pb2.CHANGE_KIND_ROLLBACK, epoch="e"),
        control_pb2.ChangeRequest(kind=control_pb2.CHANGE_KIND_REMOVE, name="maths-v1"),
    ]
    async with playing_lifecycle(controller) as (router, _):
        for request in requests:
            await run_change(request, Reach(router), as_json=False)
    assert controller.changes == requests
    assert capsys.readouterr().out.count(f"back: moesaic expert rollback {BEFORE}") == 3


async def test_rows_are_shown_before_they_go_live(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(map(str, range(10))))
    means = {0: np.arange(32, dtype="f4"), 1: np.ones(32, "f4")}
    router = PlayedRouterControl(hidden={(pb.HIDDEN_STATE_GATE_INPUT, False): means}, taken=0)
    controller, order = PlayedLifecycle(), order_rows("hidden_ffn", prompts)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    async with playing_lifecycle(controller, router) as (address, _):
        add = {"expected_epoch": "", "as_json": False}
        with pytest.raises(Cancelled, match="nothing was changed"):
            await run_add_with_rows(bundle, order, Reach(address), yes=False, ask=lambda _: "n", **add)  # type: ignore[arg-type]
        assert controller.changes == []
        await run_add_with_rows(bundle, order, Reach(address), yes=False, ask=lambda _: "y", **add)  # type: ignore[arg-type]
    rows = controller.changes[0].gate_rows
    assert [(row.address.layer, row.address.slot) for row in rows] == [(0, 0), (1, 0)]
    err = capsys.readouterr().err
    assert "2 gate rows, hidden_ffn, of 8 prompts; 2 held out" in err
    assert "no held-out token takes the new slot" in err


async def test_where_nobody_can_be_asked_yes_is_needed(
    bundle: Bundle, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    controller, order = PlayedLifecycle(), order_rows("arrow", None, base=base)
    async with playing_lifecycle(controller) as (address, _):
        with pytest.raises(InvalidArgument, match="--yes"):
            await run_add_with_rows(
                bundle, order, Reach(address), expected_epoch="", yes=False, as_json=False
            )
    assert controller.changes == []


async def test_the_list_says_where_bundles_are_in_use(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    controller = PlayedLifecycle()
    async with playing_lifecycle(controller) as (router, _):
        await run_list(Reach(router), as_json=False)
        assert capsys.readouterr().out.startswith("no bundles: ")
        controller.bundles[bundle.digest] = stored(
            "maths-v1", digest=bundle.digest, manifest=bundle.manifest_bytes
        )
        await run_list(Reach(router), as_json=False)
        assert "layers 0-1: slot 4" in capsys.readouterr().out
        trial = stored("maths-v1", digest=bundle.digest, manifest=bundle.manifest_bytes)
        trial.canary_experts.extend(trial.experts)
        trial.ClearField("experts")
        controller.bundles[bundle.digest] = trial
        await run_list(Reach(router), as_json=False)
        assert "canary, layers 0-1: slot 4" in capsys.readouterr().out
        await run_list(Reach(router), as_json=True)
        listed = json.loads(capsys.readouterr().out)["bundles"][0]
        assert (listed["name"], listed["digest"]) == ("maths-v1", bundle.digest.hex())
        await run_show("maths-v1", Reach(router), as_json=False)
        assert bundle.digest.hex() in capsys.readouterr().out
        await run_show("maths-v1", Reach(router), as_json=True)
        assert json.loads(capsys.readouterr().out)["manifest"]["name"] == "maths-v1"


async def test_the_list_says_what_all_bundles_take_and_which_earlier_epoch_needs_one(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    controller = PlayedLifecycle()
    for digest, needed_by in ((b"a" * 32, BEFORE), (b"b" * 32, "")):
        one = stored("maths-v1", digest=digest, manifest=bundle.manifest_bytes, layers=0)
        one.needed_by = needed_by
        controller.bundles[digest] = one
    async with playing_lifecycle(controller) as (router, _):
        await run_list(Reach(router), as_json=False)
    printed = capsys.readouterr().out
    assert printed.count(f"epoch {BEFORE}") == 1
    assert printed.splitlines()[-1] == "9.5 MiB in all"


async def test_a_bundle_is_forgotten_by_its_name(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    controller = PlayedLifecycle()
    controller.bundles[bundle.digest] = stored(
        "maths-v1", digest=bundle.digest, manifest=bundle.manifest_bytes
    )
    kept = dict(controller.bundles)
    async with playing_lifecycle(controller) as (router, _):
        await run_forget("maths-v1", Reach(router), as_json=False)
        assert capsys.readouterr().out == "maths-v1 is forgotten: 4.8 MiB given back\n"
        assert controller.bundles == {}
        with pytest.raises(NotFound):
            await run_forget("maths-v1", Reach(router), as_json=False)
        controller.bundles = dict(kept)
        await run_forget(bundle.digest.hex()[:8], Reach(router), as_json=True)
        assert json.loads(capsys.readouterr().out) == {
            "bundle": "maths-v1",
            "digest": bundle.digest.hex(),
            "num_bytes": 5_000_000,
        }
        controller.bundles, controller.error = kept, FailedPrecondition("bundle: is needed", field="bundle")
        with pytest.raises(FailedPrecondition, match="is needed"):
            await run_forget("maths-v1", Reach(router), as_json=False)


async def test_the_history_says_what_was_decided_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    controller = PlayedLifecycle()
    why = "3 of 120 requests failed, 2.5 % against at most 1 %"
    controller.history.epoch, controller.history.canary = EPOCH, "c1"
    controller.history.canary_figures = "7 requests finished, 0 failed"
    controller.history.entries.add(time=1.79e9, what="rollback", epoch=EPOCH, bundle="legal-v2", detail=why)
    async with playing_lifecycle(controller) as (router, _):
        await run_history(Reach(router), limit=5, as_json=False)
        out = capsys.readouterr().out
        assert out.splitlines()[:2] == [
            f"epoch {EPOCH}, canary c1",
            "canary so far: 7 requests finished, 0 failed",
        ]
        assert "rollback legal-v2" in out
        controller.history.entries.add(what="refused", bundle="ab" * 32)
        await run_history(Reach(router), limit=5, as_json=False)
        assert "refused abababababab  " in capsys.readouterr().out
        await run_history(Reach(router), limit=5, as_json=True)
        assert json.loads(capsys.readouterr().out)["entries"][0]["detail"] == why


def test_the_played_bundles_are_valid(bundle: Bundle, legal: Bundle) -> None:
    verify(bundle)
    verify(legal)
