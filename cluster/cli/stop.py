"""`moesaic stop`: ends the processes of Moesaic on a Ray cluster that a `moesaic serve` had joined.

A `moesaic serve` ends its own processes. One that was killed leaves them behind, and they go on serving.
"""

from __future__ import annotations

import contextlib
import json
import sys

from moesaic.errors import InvalidArgument
from moesaic.settings import Settings
from moesaic.stop_signals import StopSignals


async def run_stop(settings: Settings, *, as_json: bool) -> None:
    """Raises InvalidArgument without an address, Unavailable when no Ray answers there."""
    if settings.cluster.address is None:
        raise InvalidArgument(
            "address: is needed: a local Ray ends with its `moesaic serve`", field="address"
        )
    with contextlib.redirect_stdout(sys.stderr):
        names = await _kill_all(settings)
    print(json.dumps({"stopped": names}) if as_json else f"stopped {len(names)} processes")


async def _kill_all(settings: Settings) -> list[str]:
    from cluster.processes.ray_cluster import RayCluster

    with StopSignals() as signals:
        ray = await signals.unless_stopped(RayCluster.connect(settings, num_processes=0, force=signals.force))
        try:
            names = list(ray.names())
            await ray.kill(names)
        finally:
            await ray.close()
    return names
