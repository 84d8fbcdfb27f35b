"""A cut that the drill makes: silence in its direction while it lasts, and nothing of it afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from cluster.drill.faults import Direction

pytestmark = [pytest.mark.multihost, pytest.mark.timeout(120)]

# Runs in a network of its own, in which loopback is the only device and 127.0.0.2 stands for another host.
PROGRAM = """
import asyncio, subprocess, sys
from cluster.drill.faults import Direction
from cluster.drill.network_cut import cut

OTHER = "127.0.0.2"

async def reach(port):
    try:
        async with asyncio.timeout(1.0):
            _, writer = await asyncio.open_connection(OTHER, port)
        writer.close()
        return True
    except TimeoutError:
        return False

async def main():
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    server = await asyncio.start_server(lambda reader, writer: writer.close(), OTHER, 0)
    port = server.sockets[0].getsockname()[1]
    seen = [await reach(port)]
    async with cut([OTHER], Direction(sys.argv[1])):
        seen.append(await reach(port))
    seen.append(await reach(port))
    tables = subprocess.run(["nft", "list", "tables"], check=True, capture_output=True, text=True).stdout
    print(seen, tables.split())

asyncio.run(main())
"""


@pytest.mark.parametrize("direction", Direction)
def test_a_cut_host_is_silent_until_the_cut_ends(direction: Direction) -> None:
    if os.geteuid() != 0 or any(shutil.which(program) is None for program in ("nft", "ip", "unshare")):
        pytest.skip("needs root, nft, ip and unshare")
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", PROGRAM, direction],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "unshare failed" in done.stderr:
        pytest.skip("needs namespaces")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[True, False, True] []\n"
