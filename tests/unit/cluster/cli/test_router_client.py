"""What a client verb is told when no router listens, and what it is told when one does and cannot serve."""

from __future__ import annotations

import pytest
from support.fake_router import FakeRouter, running

from cluster.cli.router_client import router_client
from moesaic.errors import Unavailable


@pytest.mark.parametrize("target", ["{closed}", "no.such.host.invalid:50051"])
async def test_without_a_router_the_address_is_named(target: str, closed_address: str) -> None:
    target = target.format(closed=closed_address)
    with pytest.raises(Unavailable) as caught:
        async with router_client(target) as client:
            await client.model_info()
    assert caught.value.message == f"no router answers at {target}: is `moesaic serve` running?"


async def test_what_a_router_says_that_cannot_serve_is_kept() -> None:
    router = FakeRouter(error=Unavailable("the router is draining", reason="DRAINING"))
    async with running(router) as link:
        with pytest.raises(Unavailable) as caught:
            async with router_client(link.address) as client:
                await client.complete("a")
    assert (caught.value.message, caught.value.reason) == ("the router is draining", "DRAINING")


async def test_a_router_that_goes_away_in_mid_answer_is_not_reported_as_never_there() -> None:
    async with running(FakeRouter(pace_s=0.01)) as link:
        with pytest.raises(Unavailable) as caught:
            async with router_client(link.address) as client:
                async for _ in client.generate("ab", max_tokens=100, timeout_s=2.0):
                    await link.kill()
    assert "no router answers" not in caught.value.message
