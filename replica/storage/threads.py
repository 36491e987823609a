"""Blocking calls in threads and tasks that use them, cancelled without harm.

Given     a function that blocks.
Returns   its result, without blocking the event loop.
Promises  a cancelled caller does not go on before the thread has ended. With asyncio.to_thread it does: it closes a
          descriptor the thread still writes to, the number is given to another file, and that file is destroyed.
Partner   replica.storage.posix and replica.storage.copy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    return await run(partial(call, *args, **kwargs))


async def run(
    call: Callable[[], T],
    *,
    executor: Executor | None = None,
    undo: Callable[[T], object] | None = None,
    on_cancel: Callable[[], object] | None = None,
) -> T:
    """`on_cancel` asks the thread to end soon; `undo` gets a result that the cancelled caller will not see."""
    future = asyncio.get_running_loop().run_in_executor(executor, call)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if on_cancel is not None:
            on_cancel()
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError:
                continue  # cancelled again; the thread still holds what we would let go of
        if not future.cancelled() and future.exception() is None and undo is not None:
            undo(future.result())
        raise


async def end_tasks(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel them, and wait until they ended, however often we are cancelled meanwhile: their threads still use
    descriptors that are closed next."""
    for task in tasks:
        task.cancel()
    again: asyncio.CancelledError | None = None
    while left := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(left)
        except asyncio.CancelledError as error:
            again = error
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at, so that nobody complains that it was not
    if again is not None:
        raise again
