"""A gateway, a fake router behind it, and clients in front: started once for each file, reset for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import openai
import pytest
import pytest_asyncio
from support.gateway_site import Site, running_site


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_site() -> AsyncIterator[Site]:
    async with running_site() as it:
        yield it


@pytest.fixture
def site(module_site: Site) -> Site:
    module_site.router.reset()
    return module_site


@pytest_asyncio.fixture(loop_scope="module")
async def own_site() -> AsyncIterator[Site]:
    """For a test that ends a part of it."""
    async with running_site() as it:
        yield it


@pytest_asyncio.fixture(loop_scope="module")
async def http(site: Site) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=site.url, timeout=60) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def client(site: Site) -> AsyncIterator[openai.AsyncOpenAI]:
    async with site.openai() as it:
        yield it


@pytest_asyncio.fixture(loop_scope="module")
async def own_http(own_site: Site) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=own_site.url, timeout=60) as client:
        yield client
