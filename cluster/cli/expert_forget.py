"""`moesaic expert forget`: a stored bundle that is not needed any more is deleted."""

from __future__ import annotations

import json

from cluster.bundles.controller_client import controller_client
from cluster.cli.expert_change import Reach, find_bundle, operator_name
from cluster.terminal.tables import size


async def run_forget(name: str, reach: Reach, *, as_json: bool) -> None:
    """Raises NotFound for a bundle that the controller does not have, and what the controller refuses with."""
    async with controller_client(await reach.address()) as client:
        stored = await find_bundle(name, client)
        forgotten = await client.forget(stored.digest, operator_name())
    if as_json:
        values = {
            "bundle": forgotten.name,
            "digest": stored.digest.hex(),
            "num_bytes": forgotten.num_bytes,
        }
        print(json.dumps(values))
    else:
        print(f"{forgotten.name} is forgotten: {size(forgotten.num_bytes)} given back")
