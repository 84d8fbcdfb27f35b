"""Signatures: who vouches for a bundle, and what a cluster that asks for it refuses."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from moesaic.bundles import Bundle, open_bundle
from moesaic.bundles.signature import check_signature, read_private_key, read_signers, sign, signer_of
from moesaic.errors import InvalidArgument

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()


def reason_of(bundle: Bundle, *signers: bytes) -> str:
    with pytest.raises(InvalidArgument) as refused:
        check_signature(bundle, signers)
    return refused.value.reason


def test_who_signed_is_told(bundle: Bundle) -> None:
    assert signer_of(bundle) is None
    signed = sign(bundle, KEY)
    assert signer_of(signed) == PUBLIC
    check_signature(signed, {PUBLIC})
    assert signed.digest == bundle.digest


def test_a_cluster_without_signers_takes_bundles_without_signatures(bundle: Bundle) -> None:
    check_signature(bundle, ())
    check_signature(sign(bundle, KEY), ())


def test_an_unsigned_bundle_is_refused_where_signatures_are_required(bundle: Bundle) -> None:
    assert reason_of(bundle, PUBLIC) == "BUNDLE_SIGNATURE"


def test_a_stranger_is_refused(bundle: Bundle) -> None:
    assert reason_of(sign(bundle, Ed25519PrivateKey.generate()), PUBLIC) == "BUNDLE_SIGNATURE"


def test_a_manifest_that_was_changed_after_signing_is_refused_by_everybody(bundle: Bundle) -> None:
    sign(bundle, KEY)
    manifest = bundle.folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"licence": ""', b'"licence": "MIT"'))
    changed = open_bundle(bundle.folder)
    assert reason_of(changed, PUBLIC) == reason_of(changed) == "BUNDLE_SIGNATURE"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b"{}",
        b'{"algorithm": "none", "public_key": "", "signature": ""}',
        b'{"algorithm": "ed25519", "public_key": "AA==", "signature": "AA=="}',
        b'{"algorithm": "ed25519", "public_key": 3, "signature": null}',
    ],
)
def test_a_malformed_signature_is_refused(bundle: Bundle, content: bytes) -> None:
    (bundle.folder / "signature.json").write_bytes(content)
    assert reason_of(open_bundle(bundle.folder)) == "BUNDLE_SIGNATURE"


def test_keys_are_read_as_pem_files_or_base64(tmp_path: Path) -> None:
    private, public = tmp_path / "key.pem", tmp_path / "key.pub.pem"
    private.write_bytes(KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    assert read_private_key(private).private_bytes_raw() == KEY.private_bytes_raw()
    assert read_signers((str(public), base64.b64encode(PUBLIC).decode())) == {PUBLIC}


def test_what_is_no_ed25519_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rsa.pem"
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    for wrong in (file, tmp_path / "nowhere.pem"):
        with pytest.raises(InvalidArgument) as refused:
            read_private_key(wrong)
        assert refused.value.field == "sign"
        with pytest.raises(InvalidArgument) as refused:
            read_signers((str(wrong),))
        assert refused.value.field == "signers"


def test_the_signature_file_is_plain_json(bundle: Bundle) -> None:
    signed = sign(bundle, KEY)
    assert signed.signature_bytes is not None
    assert json.loads(signed.signature_bytes)["public_key"] == base64.b64encode(PUBLIC).decode()
