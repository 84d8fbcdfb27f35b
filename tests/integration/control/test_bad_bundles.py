"""Every bundle that is not right is refused with its reason, and nothing changes."""

from __future__ import annotations

import asyncio
import errno
import json
import pickle
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from support.played_workers import upload

from cluster.control.bundle_store import Upload
from moesaic.bundles import Bundle
from moesaic.bundles.signature import sign
from moesaic.settings import RolloutSettings
from moesaic.v1 import control_pb2

pytestmark = pytest.mark.timeout(60)


def truncate(bundle: Bundle) -> None:
    weights = bundle.weights_file
    weights.write_bytes(weights.read_bytes()[:-10])


def flip_a_byte(bundle: Bundle) -> None:
    weights = bundle.weights_file
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def pickled(bundle: Bundle) -> None:
    bundle.weights_file.write_bytes(pickle.dumps({"gate": [1.0] * 100}))


def manifest(**changes: Any) -> Callable[[Bundle], None]:
    def change(bundle: Bundle) -> None:
        file = bundle.folder / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def expert(**changes: Any) -> Callable[[Bundle], None]:
    def change(bundle: Bundle) -> None:
        file = bundle.folder / "manifest.json"
        content = json.loads(file.read_text())
        content["experts"][0] |= changes
        file.write_text(json.dumps(content))

    return change


def twice(bundle: Bundle) -> None:
    file = bundle.folder / "manifest.json"
    file.write_text(file.read_text().replace('"name":', '"name": "other", "name":', 1))


def wrong_shape(bundle: Bundle) -> None:
    file = bundle.folder / "manifest.json"
    content = json.loads(file.read_text())
    tensor = content["experts"][0]["weights"]["down"]
    content["tensors"][tensor]["shape"] = content["tensors"][tensor]["shape"][::-1]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncate, "BUNDLE_WEIGHTS"),
        (flip_a_byte, "BUNDLE_DIGEST"),
        (pickled, "BUNDLE_PICKLE"),
        (wrong_shape, "BUNDLE_SHAPE"),
        (twice, "BUNDLE_DUPLICATE"),
        (manifest(base_fingerprint="0" * 64), "BUNDLE_BASE"),
        (manifest(name="../../etc/passwd"), "BUNDLE_NAME"),
        (manifest(format="moesaic-bundle/9"), "BUNDLE_FORMAT"),
        (expert(kind="surprise"), "BUNDLE_KIND"),
        (expert(layer=7), "BUNDLE_TARGET"),
        (expert(weights={"gate": "/etc/passwd", "up": "../up", "down": "down"}), "BUNDLE_TENSORS"),
    ],
)
async def test_a_bundle_that_is_not_right_is_refused_when_it_is_uploaded(
    rig, bundle, spoil: Callable[[Bundle], None], reason: str
) -> None:
    legal = bundle("legal", [(0, 3)])
    spoil(legal)
    async with rig.running(with_router=False):
        assert await refusal(rig.upload(legal)) == ("INVALID_ARGUMENT", reason, "bundle")
        await nothing_changed(rig)


async def test_weights_that_are_not_finite_are_refused(rig, bundle, base) -> None:
    module = base.model.experts[0].module
    weights = {name: np.full(module.shape(name), np.nan, np.float32) for name in module.weights}
    legal = bundle("legal", [(0, 3)], weights={(0, 3): weights})
    async with rig.running(with_router=False):
        assert await refusal(rig.upload(legal)) == ("INVALID_ARGUMENT", "BUNDLE_NOT_FINITE", "bundle")
        await nothing_changed(rig)


async def test_a_bundle_without_the_signature_of_a_known_signer_is_refused(rig, bundle) -> None:
    key, stranger = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    legal = bundle("legal", [(0, 3)])
    rig = rig.restarted_with(signers=frozenset({key.public_key().public_bytes_raw()}))
    async with rig.running(with_router=False):
        for signed in (legal, sign(legal, stranger)):
            refused = await refusal(upload(rig.stub, legal.folder, signature=signed.signature_bytes))
            assert refused == ("INVALID_ARGUMENT", "BUNDLE_SIGNATURE", "bundle")
        await nothing_changed(rig)
        known = sign(legal, key)
        assert (await upload(rig.stub, legal.folder, signature=known.signature_bytes)).name == "legal"


async def test_a_bundle_beyond_the_limit_is_refused_while_it_arrives(rig, bundle) -> None:
    legal = bundle("legal", [(0, 3)])
    rig = rig.restarted_with(settings=RolloutSettings(max_bundle_mib=1))
    async with rig.running(with_router=False):

        async def parts() -> AsyncIterator[control_pb2.UploadBundleRequest]:
            yield control_pb2.UploadBundleRequest(manifest=legal.manifest_bytes)
            for _ in range(10):
                yield control_pb2.UploadBundleRequest(weights=bytes(1 << 18))

        assert await refusal(rig.stub.UploadBundle(parts())) == ("INVALID_ARGUMENT", "TOO_LARGE", "bundle")
        await nothing_changed(rig)


async def test_a_full_disk_refuses_the_bundle(rig, bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Upload, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    legal = bundle("legal", [(0, 3)])
    async with rig.running(with_router=False):
        monkeypatch.setattr("cluster.control.bundle_store._sync", lambda file: full(file, b""))
        assert await refusal(rig.upload(legal)) == ("FAILED_PRECONDITION", "DISK_FULL", "bundle")
        await nothing_changed(rig)
        monkeypatch.undo()
        assert (await rig.upload(legal)).digest == legal.digest


async def test_an_upload_that_ends_half_way_leaves_nothing(rig, bundle) -> None:
    legal = bundle("legal", [(0, 3)])
    async with rig.running(with_router=False):
        begun = asyncio.Event()

        async def parts() -> AsyncIterator[control_pb2.UploadBundleRequest]:
            yield control_pb2.UploadBundleRequest(manifest=legal.manifest_bytes)
            begun.set()
            await asyncio.Event().wait()

        call = rig.stub.UploadBundle(parts())
        await begun.wait()
        async with asyncio.timeout(10):
            while not list(_bundles_folder(rig).iterdir()):
                await asyncio.sleep(0.01)
            call.cancel()
            while list(_bundles_folder(rig).iterdir()):
                await asyncio.sleep(0.01)
        await nothing_changed(rig)


@pytest.mark.parametrize(
    "parts",
    [
        [control_pb2.UploadBundleRequest(weights=b"x")],
        [control_pb2.UploadBundleRequest(manifest=b"{}"), control_pb2.UploadBundleRequest(manifest=b"{}")],
        [control_pb2.UploadBundleRequest()],
        [],
    ],
)
async def test_parts_out_of_order_are_refused(rig, parts: list[control_pb2.UploadBundleRequest]) -> None:
    async with rig.running(with_router=False):
        assert (await refusal(rig.stub.UploadBundle(iter(parts))))[0] == "INVALID_ARGUMENT"
        await nothing_changed(rig)


async def test_a_stored_bundle_is_listed_with_its_size_and_fetched_from_any_offset(rig, bundle) -> None:
    legal = bundle("legal", [(0, 3)], tags=["law"])
    async with rig.running(with_router=False):
        assert not (await rig.upload(legal)).known
        assert (await rig.upload(legal)).known
        (listed,) = (await rig.stub.ListBundles(control_pb2.ListBundlesRequest())).bundles
        assert (listed.name, listed.digest, list(listed.tags)) == ("legal", legal.digest, ["law"])
        assert listed.num_bytes == legal.num_bytes and not listed.experts
        request = control_pb2.FetchBundleRequest(digest=legal.digest, offset=100)
        messages = [message async for message in rig.stub.FetchBundle(request)]
        assert messages[0].manifest == legal.manifest_bytes
        assert b"".join(it.weights for it in messages) == legal.weights_file.read_bytes()[100:]
        unknown = rig.stub.FetchBundle(control_pb2.FetchBundleRequest(digest=bytes(32)))
        assert await refusal(_drain(unknown)) == ("NOT_FOUND", "NOT_FOUND", "bundle")


async def test_an_order_for_a_bundle_that_is_not_stored_is_refused(rig) -> None:
    async with rig.running():
        async with asyncio.timeout(10):
            while rig.router.epoch is None:
                await asyncio.sleep(0.01)
        refused = await refusal(rig.change(kind=control_pb2.CHANGE_KIND_SWAP, bundle=bytes(32)))
        assert refused == ("NOT_FOUND", "NOT_FOUND", "bundle")


async def _drain(call: Any) -> None:
    async for _ in call:
        pass


async def refusal(call: Any) -> tuple[str, str, str]:
    """The code, the reason and the field."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    status = rpc_status.from_call(refused.value)
    info = error_details_pb2.ErrorInfo()
    assert status is not None and status.details[0].Unpack(info)
    return refused.value.code().name, info.reason, info.metadata["field"]


def _bundles_folder(rig: Any) -> Path:
    return rig.config.state / "bundles"


async def nothing_changed(rig: Any) -> None:
    async with asyncio.timeout(10):
        while list(_bundles_folder(rig).iterdir()):
            await asyncio.sleep(0.01)
    assert not (await rig.stub.ListBundles(control_pb2.ListBundlesRequest())).bundles
    assert all(len(worker.held) == len(worker.home) for worker in rig.workers)
