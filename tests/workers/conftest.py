"""A centre that misbehaves on command, two endpoints, and movers that are stopped at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.workers.centre import Centre, World
from workers.mover import Mover


@pytest.fixture
async def centre() -> AsyncIterator[Centre]:
    async with Centre() as centre:
        yield centre


@pytest.fixture
async def world(tmp_path: Path) -> World:
    """SOURCE, SECOND and TARGET."""
    world = World(tmp_path / "world")
    for name in ("SOURCE", "SECOND", "TARGET"):
        await world.endpoint(name)
    return world


@pytest.fixture
async def running(centre: Centre) -> AsyncIterator[Callable[..., Any]]:
    """`mover = await running(...)`: a mover of this centre at work; stopped at the end if the test did not."""
    async with AsyncExitStack() as stack:

        @asynccontextmanager
        async def one(**options: Any) -> AsyncIterator[Mover]:
            options = {"poll_seconds": 1000.0, "stop_seconds": 3.0, "finish_seconds": 0.5} | options
            mover = Mover(options.pop("server", centre.url), options.pop("token", lambda: centre.token), **options)
            task = asyncio.create_task(mover.run())
            mover.task = task  # type: ignore[attr-defined]
            try:
                yield mover
            finally:
                mover.stop()
                await task

        async def start(**options: Any) -> Mover:
            return await stack.enter_async_context(one(**options))

        yield start
