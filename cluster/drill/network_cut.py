"""Cuts another host off from this one: the packets between them are dropped, and nobody is told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Sequence

from cluster.drill.faults import Direction
from moesaic.errors import FailedPrecondition

NFT_TIMEOUT_S = 10.0
_CHAINS = {Direction.IN: ("input", "saddr"), Direction.OUT: ("output", "daddr")}


def check_can_cut() -> None:
    """Raises FailedPrecondition."""
    if shutil.which("nft") is None or os.geteuid() != 0:
        raise FailedPrecondition(
            "fault: partition drops packets with nft (nftables), which needs root", field="fault"
        )


@contextlib.asynccontextmanager
async def cut(addresses: Sequence[str], direction: Direction) -> AsyncIterator[None]:
    """Drops what comes from the hosts (IN), what goes to them (OUT), or both, until the context ends."""
    table = f"moesaic_drill_{secrets.token_hex(4)}"
    try:
        await _nft("".join(rules(table, addresses, direction)))
        yield
    finally:
        await _nft(f"add table inet {table}\ndelete table inet {table}\n")


def rules(table: str, addresses: Sequence[str], direction: Direction) -> list[str]:
    """The lines of an nft program that drop the packets, in a table of their own."""
    lines = [f"add table inet {table}\n"]
    for side in (Direction.IN, Direction.OUT) if direction is Direction.BOTH else (direction,):
        chain, of = _CHAINS[side]
        lines.append(
            f"add chain inet {table} {chain} {{ type filter hook {chain} priority -10; policy accept; }}\n"
        )
        lines += [
            f"add rule inet {table} {chain} {'ip6' if ':' in address else 'ip'} {of} {address} drop\n"
            for address in addresses
        ]
    return lines


async def _nft(program: str) -> None:
    process = await asyncio.create_subprocess_exec(
        "nft", "-f", "-", stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(NFT_TIMEOUT_S):
        _, error = await process.communicate(program.encode())
    if process.returncode:
        raise FailedPrecondition(f"fault: nft refuses: {error.decode().strip()}", field="fault")
