"""What benchmarks beside another tool have in common: CPU seconds, requests, and the ratios of both."""

from __future__ import annotations

import asyncio
import os
import re
import statistics
from collections import Counter
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any


def cpu_seconds(*servers: int) -> float:
    """Of this process, of those it has waited for, and of servers with their children, by their numbers."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(stat.parent.name) in servers or int(fields[1]) in servers:
            ticks += int(fields[11]) + int(fields[12])
    return sum(os.times()[:4]) + ticks / os.sysconf("SC_CLK_TCK")


def ratio_of(theirs: list[float], ours: list[float]) -> float:
    """Theirs by ours, pair by pair: above 1, ours took less."""
    return round(statistics.median(t / max(o, 1e-9) for t, o in zip(theirs, ours, strict=True)), 2)


@asynccontextmanager
async def counting(port: int) -> Any:
    """A proxy that counts the requests which pass through it, by their methods."""
    counts: Counter[str] = Counter()
    request = re.compile(rb"(?:^|\n)([A-Z]{3,9}) /[^ \r\n]* HTTP/1\.1\r\n")

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: bool) -> None:
        try:
            while piece := await reader.read(1 << 16):
                if count:
                    counts.update(method.decode() for method in request.findall(piece))
                writer.write(piece)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", port)
        with suppress(asyncio.CancelledError):  # at the end; the streams would tell it as an error
            await asyncio.gather(pipe(reader, there[1], True), pipe(there[0], writer, False))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", counts
    finally:
        server.close()
