"""Who vouches for a bundle: an ed25519 signature over the bytes of manifest.json, in signature.json.

The manifest has the digest of every tensor, so the signature covers all of the bundle.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection, Iterable
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from moesaic.bundles.bundle import Bundle, open_bundle
from moesaic.bundles.manifest import SIGNATURE_FILE
from moesaic.bundles.refusal import refuse
from moesaic.errors import InvalidArgument

ALGORITHM = "ed25519"
KEY_BYTES = 32
_KEYS = frozenset({"algorithm", "public_key", "signature"})


def read_private_key(file: Path) -> Ed25519PrivateKey:
    """A key in PEM without a password. Raises InvalidArgument with field `sign`."""
    try:
        key = load_pem_private_key(file.read_bytes(), password=None)
    except OSError as error:
        raise InvalidArgument(f"sign: cannot be read: {error.strerror}", field="sign") from error
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidArgument(
            "sign: must be an ed25519 key in PEM without a password, as `openssl genpkey -algorithm ed25519` makes",
            field="sign",
        )
    return key


def sign(bundle: Bundle, key: Ed25519PrivateKey) -> Bundle:
    """Writes signature.json, in place of one that is there, and opens the bundle again."""
    content = {
        "algorithm": ALGORITHM,
        "public_key": base64.b64encode(key.public_key().public_bytes_raw()).decode(),
        "signature": base64.b64encode(key.sign(bundle.manifest_bytes)).decode(),
    }
    (bundle.folder / SIGNATURE_FILE).write_text(json.dumps(content, indent=2) + "\n")
    return open_bundle(bundle.folder)


def read_signers(signers: Iterable[str]) -> frozenset[bytes]:
    """Public keys, each given in base64 or as a file in PEM. Raises InvalidArgument with field `signers`."""
    return frozenset(_read_signer(signer) for signer in signers)


def signer_of(bundle: Bundle) -> bytes | None:
    """The public key of the valid signature; None for a bundle without one.

    Raises InvalidArgument with field `bundle` where the signature is not that of this manifest.
    """
    if bundle.signature_bytes is None:
        return None
    try:
        content = json.loads(bundle.signature_bytes)
        if not isinstance(content, dict) or content.keys() != _KEYS or content["algorithm"] != ALGORITHM:
            refuse("SIGNATURE", SIGNATURE_FILE, f"must have {', '.join(sorted(_KEYS))}, of {ALGORITHM}")
        public = base64.b64decode(content["public_key"], validate=True)
        signature = base64.b64decode(content["signature"], validate=True)
        Ed25519PublicKey.from_public_bytes(public).verify(signature, bundle.manifest_bytes)
    except (ValueError, TypeError, RecursionError):
        refuse("SIGNATURE", SIGNATURE_FILE, "is malformed")
    except InvalidSignature:
        refuse("SIGNATURE", SIGNATURE_FILE, "is not a signature of this manifest.json")
    return public


def check_signature(bundle: Bundle, signers: Collection[bytes]) -> None:
    """Raises InvalidArgument with field `bundle` unless one of the signers vouches for it, or if there are none to ask
    and the signature is wrong."""
    signer = signer_of(bundle)
    if not signers:
        return
    if signer is None:
        refuse(
            "SIGNATURE", "the bundle", "is not signed, which this cluster requires: `pack --sign KEY` does it"
        )
    if signer not in signers:
        refuse("SIGNATURE", SIGNATURE_FILE, "is by nobody whom this cluster knows")


def _read_signer(signer: str) -> bytes:
    try:
        key = base64.b64decode(signer, validate=True)
        if len(key) == KEY_BYTES:
            return key
    except (binascii.Error, ValueError):
        pass
    return _read_public_pem(Path(signer))


def _read_public_pem(file: Path) -> bytes:
    try:
        key = load_pem_public_key(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise InvalidArgument(
            "signers: each must be an ed25519 public key, in base64 or as a file in PEM", field="signers"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidArgument("signers: each must be an ed25519 public key", field="signers")
    return key.public_bytes_raw()
