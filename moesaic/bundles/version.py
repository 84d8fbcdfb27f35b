"""The version of an expert of a bundle, from its kind and the sha256 of its weights.

An expert of kind `mlp` has the very version that a worker computes for the same weights in a model folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from moesaic.bundles.manifest import BundleExpert, TensorFacts
from moesaic.bundles.refusal import refuse
from moesaic.epoch import VersionHasher
from moesaic.families.model import ACTIVATIONS, ExpertModule
from moesaic.families.tensor_check import DTYPE_NAMES

MLP = "mlp"
_MLP_PARAMETERS = frozenset({"activation", "gated", "biased", "inner_size", "limit"})


def mlp_module(expert: BundleExpert, hidden_size: int) -> ExpertModule:
    """What an expert of kind `mlp` computes. Raises InvalidArgument for parameters that make no sense."""
    where, given = f"layer {expert.layer}", dict(expert.parameters)
    if unknown := sorted(given.keys() - _MLP_PARAMETERS):
        refuse("KIND", where, f"kind mlp has no parameter {unknown[0]}")
    activation, inner_size = given.get("activation"), given.get("inner_size")
    gated, biased, limit = given.get("gated", True), given.get("biased", False), given.get("limit")
    if activation not in ACTIVATIONS:
        refuse("KIND", where, f"activation: must be one of {', '.join(ACTIVATIONS)}")
    if type(inner_size) is not int or inner_size < 1:
        refuse("KIND", where, "inner_size: must be a whole number above zero")
    if not isinstance(gated, bool) or not isinstance(biased, bool):
        refuse("KIND", where, "gated and biased: must be true or false")
    if limit is not None and (isinstance(limit, bool | str) or limit <= 0):
        refuse("KIND", where, "limit: must be a number above zero")
    return ExpertModule(
        hidden_size, inner_size, str(activation), gated, biased, None if limit is None else float(limit)
    )


def mlp_parameters(module: ExpertModule) -> dict[str, str | int | float | bool]:
    """The parameters of kind `mlp` for such experts; the inverse of `mlp_module`."""
    parameters: dict[str, str | int | float | bool] = {
        "activation": module.activation,
        "gated": module.gated,
        "biased": module.biased,
        "inner_size": module.inner_size,
    }
    return parameters if module.limit is None else {**parameters, "limit": module.limit}


def expert_version(expert: BundleExpert, hidden_size: int, tensors: Mapping[str, TensorFacts]) -> bytes:
    """The digest of the version. `tensors` has all weights of the expert.

    Raises InvalidArgument if the parameters are wrong or the weights are not all there in one dtype.
    """
    if expert.kind == MLP:
        module = mlp_module(expert, hidden_size)
        names, kind = module.weights, module.kind
    else:
        names = tuple(sorted(expert.weights))
        kind = f"{expert.kind} {json.dumps(dict(expert.parameters), sort_keys=True)}"
    if missing := [name for name in names if name not in expert.weights]:
        refuse("TENSORS", f"layer {expert.layer}", f"weight {missing[0]} is missing")
    weights = {name: tensors[expert.weights[name]] for name in names}
    hasher = VersionHasher(kind, _dtype(expert, weights))
    for name, facts in weights.items():
        hasher.update(name, facts.shape, bytes.fromhex(facts.sha256))
    return hasher.digest()


def _dtype(expert: BundleExpert, weights: Mapping[str, TensorFacts]) -> str:
    """The dtypes of the weights as one word; those of kind `mlp` have one, which is a float."""
    stored = sorted({facts.dtype for facts in weights.values()})
    if expert.kind != MLP:
        return " ".join(stored)
    if len(stored) != 1 or stored[0] not in DTYPE_NAMES:
        refuse("SHAPE", f"layer {expert.layer}", f"all weights must be one of {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[stored[0]]
