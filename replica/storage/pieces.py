"""Reading a file's pieces without leaving anything open.

Given     an iterator of pieces, as `Storage.read` gives it.
Returns   the same pieces.
Promises  what it holds open is closed when the reader leaves, early or not.
Partner   every caller of `Storage.read` in replica.storage.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from replica.storage.base import Piece


@asynccontextmanager
async def closing(pieces: AsyncIterator[Piece]) -> AsyncIterator[AsyncIterator[Piece]]:
    """Left early, a generator holds its descriptor or connection until the collector comes; this does not wait."""
    try:
        yield pieces
    finally:
        if isinstance(pieces, AsyncGenerator):
            await pieces.aclose()
