"""Who may look at a name and then copy to it, on an S3 server that keeps no conditions.

Given     the wire, Replica's own folder in the bucket, and a way to list it.
Returns   `holding`: within, no other publisher of Replica, on whatever machine, is between its look and its copy.
Promises  whoever wants a name raises a flag for it (an object of its own beneath `.replica/publishing/`), then lists
          all flags, and goes on only if no other one stands for that name; so of two at least one sees the other.
          Where several see each other, the one of the smallest key stays and waits, the others take theirs down and
          come again.
Partner   replica.storage.s3_publish.

One flag may stand for several names: those that this process wants at the same time share one, three requests for up to
NAMES_MAX files. Names that somebody else wants too leave the group and are raised alone, so a group never waits.

The flags need what S3 servers promise, and rclone's keeps: whoever lists after a PUT was answered, sees it. A flag that
nobody took down (its owner was killed) is taken down after FLAG_SECONDS_MAX by the server's own clock; who raised one
stops trying long before.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from weakref import WeakKeyDictionary

from replica.storage.base import OWN
from replica.storage.faults import place
from replica.storage.s3_wire import Wire
from rules.errors import Busy, ReplicaError

FLAGS = f"{OWN}/publishing"
FLAG_SECONDS_MAX = 3600.0
#: From raising the flag to the request that copies.
_RAISED_SECONDS_MAX = 60.0
_WAIT_SECONDS_MAX = 30.0
_NAME_LETTERS = 32
_TOKEN_BYTES = 17
_KEY_BYTES_MAX = 1024
#: They are one name, which has at most 255 letters where the server keeps files. All flags lie in one folder: a
#: listing by rclone's server is empty when a folder goes away under it.
NAMES_MAX = 7
#: Our own flag must be listed; how long is waited for the next look when it is not.
_LISTED_AGAIN_SECONDS = (0.05, 0.2, 0.0)
#: Groups of one process that are being raised at once. More names come meanwhile, and make the next group larger.
_RAISING = 2

Raised = list[tuple[str, float]]
List = Callable[[str], Awaitable[Raised]]


class _Group:
    """Names that one flag stands for. Nobody joins once it is being raised."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.names: list[str] = []
        #: Those that somebody else wants too, once it is raised.
        self.contested: set[str] = set()
        self.since = 0.0
        self.inside = 0
        self.raising: asyncio.Task[Exception | None] | None = None
        self.flag = ""

    def named(self) -> str:
        self.flag = f"{self._folder}{'.'.join(self.names)}-{secrets.token_hex(8)}"
        return self.flag


class _Here:
    """What one event loop has."""

    def __init__(self) -> None:
        self.open: _Group | None = None
        self.turn = asyncio.Semaphore(_RAISING)
        self.ending: set[asyncio.Task[None]] = set()


class Flags:
    """`listed` lists a folder of flags: key and age in seconds."""

    def __init__(self, wire: Wire, base: str, listed: List) -> None:
        self._wire = wire
        self._folder = f"{base}{FLAGS}/"
        self._listed = listed
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _Here] = WeakKeyDictionary()
        room = _KEY_BYTES_MAX - len(self._folder.encode()) - _TOKEN_BYTES
        self._names_max = max(1, min(NAMES_MAX, room // (_NAME_LETTERS + 1)))

    @asynccontextmanager
    async def holding(self, final: str, path: str, *, alone: bool = False) -> AsyncIterator[Callable[[], None]]:
        """Yields what raises Busy once the flag has been up for too long. `alone`: nobody shall wait for us."""
        # The server tells apart what its file system does; two names it takes for one must share a flag.
        name = hashlib.sha256(final.casefold().encode()).hexdigest()[:_NAME_LETTERS]
        group = None if alone else self._join(name)
        if group is not None:
            try:
                if await self._admitted(group, name):
                    yield partial(self._still_raised, group.since, path)
                    return
            finally:
                await self._leave(group)
        async with self._alone(name, path) as since:
            yield partial(self._still_raised, since, path)

    def _still_raised(self, since: float, path: str) -> None:
        if time.monotonic() - since > _RAISED_SECONDS_MAX:
            raise Busy(f"{place(self._wire.name, path)}: publishing took too long", path=path)

    # ── several names ────────────────────────────────────────────────────────────────────────────────────────────────

    def _join(self, name: str) -> _Group | None:
        """The group that is being gathered. None: the name is in it already, for another file."""
        here = self._loops.setdefault(asyncio.get_running_loop(), _Here())
        group = here.open
        if group is None:
            group = here.open = _Group(self._folder)
            group.raising = asyncio.create_task(self._raise_group(here, group))
        elif name in group.names:
            return None
        group.names.append(name)
        group.inside += 1
        if len(group.names) >= self._names_max:
            here.open = None
        return group

    async def _raise_group(self, here: _Here, group: _Group) -> Exception | None:
        async with here.turn:
            await asyncio.sleep(0)  # who is ready at this moment comes along
            if here.open is group:
                here.open = None
            try:
                group.since = await self._raise(group.named())
                rivals = await self._rivals(group.flag, group.names)
            except Exception as error:  # noqa: BLE001  each of its files raises it
                return error
            group.contested.update(*rivals.values())
            return None

    async def _admitted(self, group: _Group, name: str) -> bool:
        assert group.raising is not None
        error = await asyncio.shield(group.raising)
        if error is not None:
            raise copy.copy(error)  # several raise it, and each says more about it
        return name not in group.contested

    async def _leave(self, group: _Group) -> None:
        group.inside -= 1
        if group.inside:
            return
        here = self._loops.setdefault(asyncio.get_running_loop(), _Here())
        if here.open is group:
            here.open = None  # all were cancelled while it was gathered
        ending = asyncio.create_task(self._end(group))
        here.ending.add(ending)
        ending.add_done_callback(here.ending.discard)
        await asyncio.shield(ending)

    async def _end(self, group: _Group) -> None:
        assert group.raising is not None
        await asyncio.wait([group.raising])
        if group.flag:
            with suppress(ReplicaError):
                await self._take_down(group.flag)

    # ── one name ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _alone(self, name: str, path: str) -> AsyncIterator[float]:
        mine = f"{self._folder}{name}-{secrets.token_hex(8)}"
        give_up = time.monotonic() + _WAIT_SECONDS_MAX
        try:
            raised = await self._raise(mine)
            while others := await self._rivals(mine, [name]):
                if time.monotonic() > give_up:
                    raise Busy(
                        f"{place(self._wire.name, path)}: others are publishing there",
                        hint="if nobody is, a worker was killed in the middle: its flag goes by itself within an hour",
                        endpoint=self._wire.name,
                        path=path,
                    )
                stays = mine < min(others)
                if not stays:
                    await self._take_down(mine)
                await asyncio.sleep(random.uniform(0.01, 0.1))
                if not stays:
                    raised = await self._raise(mine)
            yield raised
        finally:
            with suppress(ReplicaError):
                await asyncio.shield(self._take_down(mine))

    # ── flags ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _raise(self, flag: str) -> float:
        began = time.monotonic()
        await self._wire.call("PUT", flag, path=FLAGS)
        return began

    async def _take_down(self, flag: str) -> None:
        await self._wire.call("DELETE", flag, path=FLAGS, returned=(404,))

    async def _rivals(self, mine: str, names: list[str]) -> dict[str, set[str]]:
        """Other flags that stand for any of these names, and for which."""
        for wait_seconds in _LISTED_AGAIN_SECONDS:
            found = await self._listed(f"{FLAGS}/")
            if any(flag == mine for flag, _ in found):
                break
            await asyncio.sleep(wait_seconds)
        else:
            # It was taken for a dead one's, or the server's listings lag behind: then flags prove nothing.
            raise Busy("our own flag is not to be seen: this server's listings cannot be relied upon")
        rivals: dict[str, set[str]] = {}
        for flag, age_seconds in found:
            common = set(names).intersection(self._names_of(flag)) if flag != mine else set()
            if common and age_seconds > FLAG_SECONDS_MAX:
                await self._take_down(flag)
            elif common:
                rivals[flag] = common
        return rivals

    def _names_of(self, flag: str) -> list[str]:
        return flag.removeprefix(self._folder).partition("-")[0].split(".")
