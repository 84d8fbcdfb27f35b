"""Expert bundles: a folder with a manifest and the weights of experts, the unit that people publish."""

from moesaic.bundles.bundle import Bundle, TensorSource, open_bundle, write_bundle
from moesaic.bundles.gate_row import effective_row, effective_values
from moesaic.bundles.manifest import BundleExpert, BundleGateRow, Manifest, ProbeVectors, TensorFacts
from moesaic.bundles.verification import BaseModel, check_base, growth_problem, verify

__all__ = [
    "BaseModel",
    "Bundle",
    "BundleExpert",
    "BundleGateRow",
    "Manifest",
    "ProbeVectors",
    "TensorFacts",
    "TensorSource",
    "check_base",
    "effective_row",
    "effective_values",
    "growth_problem",
    "open_bundle",
    "verify",
    "write_bundle",
]
