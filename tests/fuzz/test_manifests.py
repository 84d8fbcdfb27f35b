"""manifest.json and signature.json of expert bundles."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.fuzzing import fuzzed, refusals
from support.mutations import bytes_near, json_near

from expert_worker.experts.kinds.lora import LoraKind
from moesaic.bundles import Bundle, Manifest
from moesaic.bundles.manifest import FORMAT
from moesaic.bundles.signature import signer_of
from moesaic.bundles.version import mlp_module
from moesaic.families.model import ExpertModule

MLP = {
    "layer": 0,
    "slot": None,
    "kind": "mlp",
    "parameters": {"activation": "silu", "gated": True, "inner_size": 4, "limit": 7.0},
    "version": "cd" * 32,
    "weights": {"gate": "g", "up": "u", "down": "d"},
    "gate_row": {"tensor": "row", "norm": "unit", "temperature": 0.5, "bias": 0.0, "selection_bias": 0.0},
    "probe": {"inputs": "in", "outputs": "out"},
}
LORA = {
    "layer": 1,
    "slot": 0,
    "kind": "lora",
    "parameters": {"base_slot": 1, "rank": 2, "base_version": "cd" * 32, "alpha": 4.0},
    "version": "cd" * 32,
    "weights": {"up_a": "a", "up_b": "b"},
}
MANIFEST = {
    "format": FORMAT,
    "name": "maths-v1",
    "base_model": "tiny",
    "base_fingerprint": "ab" * 32,
    "hidden_size": 8,
    "experts": [MLP, LORA],
    "tensors": {"g": {"sha256": "ef" * 32, "dtype": "F32", "shape": [4, 8]}},
    "tags": ["maths"],
    "origin": {"tool": "pack"},
}
MODULE = ExpertModule(8, 4, "silu", True, False, None)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
SIGNATURE = {
    "algorithm": "ed25519",
    "public_key": base64.b64encode(KEY.public_key().public_bytes_raw()).decode(),
    "signature": base64.b64encode(KEY.sign(b"manifest")).decode(),
}


@fuzzed("manifests", bytes_near(json_near(MANIFEST)) | json_near(MANIFEST), examples=150)
def test_a_manifest_is_read_as_it_is_written_or_refused(raw: bytes) -> None:
    with refusals():
        manifest = Manifest.from_json(raw)
        assert Manifest.from_json(manifest.to_json()) == manifest
        for expert in manifest.experts:
            with refusals():
                mlp_module(expert, manifest.hidden_size)
            with refusals():
                LoraKind.of(expert, MODULE)


@fuzzed("signatures", bytes_near(json_near(SIGNATURE)) | json_near(SIGNATURE), examples=60)
def test_a_signature_is_by_whoever_signed_or_refused(raw: bytes) -> None:
    manifest = Manifest.from_json(json.dumps(MANIFEST).encode())
    with refusals():
        assert (
            signer_of(Bundle(Path(), manifest, b"manifest", raw, {})) == KEY.public_key().public_bytes_raw()
        )
