"""The version of an expert: the digest of its kind, dtype and weights, whatever file they come from."""

from __future__ import annotations

from collections.abc import Mapping

from moesaic.epoch import VersionHasher
from moesaic.families.model import ExpertModule

# The shape of a weight, and the sha256 of its bytes as it is stored.
WeightDigest = tuple[tuple[int, ...], bytes]


def mlp_version(module: ExpertModule, dtype: str, digests: Mapping[str, WeightDigest]) -> bytes:
    """The version of an MLP whose weights have these digests, by their names in the module.

    `dtype` is that of the weights as torch spells it: float32, bfloat16, float16.
    """
    kind = f"{'glu' if module.gated else 'mlp'} {module.activation}"
    return hash_weights(
        kind if module.limit is None else f"{kind} {module.limit}",
        dtype,
        {name: digests[name] for name in module.weights},
    )


def hash_weights(kind: str, dtype: str, digests: Mapping[str, WeightDigest]) -> bytes:
    """The version of an expert of any kind. `kind` holds all that its function depends on beside its weights, which
    count in the order in which they are given."""
    hasher = VersionHasher(kind, dtype)
    for name, (shape, digest) in digests.items():
        hasher.update(name, shape, digest)
    return hasher.digest()
