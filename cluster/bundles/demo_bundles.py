"""The bundles that come with Moesaic: two versions of experts that the built-in model lacks."""

from __future__ import annotations

from pathlib import Path

BUNDLES = Path(__file__).parents[1] / "demo_bundles"
# The first adds slots to the model; the other one takes their place.
FIRST, BETTER = "maths-v1", "maths-v2"
