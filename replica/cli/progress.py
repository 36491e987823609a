"""How far long work is: a bar on a terminal, plain lines elsewhere; always on stderr.

Given     replica.client's Progress, several times a second.
Returns   nothing; draws.
Promises  rich is imported only for a bar on a terminal; elsewhere a line every few seconds, and none for quick work.
Partner   replica.cli.files.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from replica.cli.output import human_size, say
from replica.client.parallel import Progress, Tell

_LINE_EVERY_SECONDS = 5.0


@contextmanager
def progress(what: str) -> Iterator[Tell]:
    """Within, what is told is shown."""
    if not sys.stderr.isatty():
        yield _lines(what)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description} {task.fields[files]}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None, files="")

        def tell(now: Progress) -> None:
            files = f"{now.files_done}/{now.files_total} files"
            bars.update(task, total=now.bytes_total, completed=min(now.bytes_done, now.bytes_total), files=files)

        yield tell


def _lines(what: str) -> Tell:
    said_at = time.monotonic()

    def tell(now: Progress) -> None:
        nonlocal said_at
        if time.monotonic() - said_at < _LINE_EVERY_SECONDS:
            return
        said_at = time.monotonic()
        say(
            f"{what}: {now.files_done} of {now.files_total} files,"
            f" {human_size(now.bytes_done)} of {human_size(now.bytes_total)}"
        )

    return tell
