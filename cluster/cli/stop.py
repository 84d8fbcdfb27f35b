"""`moesaic stop`: ends the processes of Moesaic on a Ray that was joined.

A `moesaic serve` ends its own processes. Only one that was killed leaves them behind, and they go on serving: this is
how to end those.
"""

from __future__ import annotations

import contextlib
import json
import sys

from moesaic.errors import InvalidArgument
from moesaic.settings import load_settings


async def run_stop(address: str | None, *, as_json: bool) -> None:
    """Raises InvalidArgument without an address, Unavailable when there is no Ray at it."""
    settings = load_settings(cluster={"address": address})
    if settings.cluster.address is None:
        raise InvalidArgument(
            "address: is needed: a local Ray ends with its `moesaic serve`", field="address"
        )
    with contextlib.redirect_stdout(sys.stderr):
        names = await _kill_all(settings.cluster.address)
    print(json.dumps({"stopped": names}) if as_json else f"stopped {len(names)} processes")


async def _kill_all(address: str) -> list[str]:
    from cluster.processes.ray_cluster import RayCluster

    settings = load_settings(cluster={"address": address})
    ray = RayCluster.connect(settings, num_processes=0)
    try:
        names = list(ray.names())
        await ray.kill(names)
    finally:
        ray.close()
    return names
