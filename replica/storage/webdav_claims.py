"""One publisher at a time for each name, on servers whose MOVE replaces.

Given     the final path somebody is about to publish.
Returns   a context in which no other Replica process publishes under that path.
Promises  of any number of claimants one holds the name; a claim whose holder died is broken after five minutes; nothing
          that is broken or given back late can make two holders move at once, for a holder moves within one minute of
          its claim or not at all.
Partner   replica.storage.webdav.publish.

WebDAV has no verb that makes a thing only if it is not there: MKCOL says "created" to all of eight (rclone, XRootD), a
MOVE of a file replaces (XRootD), LOCK is optional. But all of them rename folders by rename(2), and that refuses to
replace a folder with something in it. So a claimant keeps a folder with one file in it, and claims a name by moving
that folder to `.replica/publish/<hash of the name>`; it moves it back afterwards. The file's name says who it is.
Thirty rounds of eight had one winner each, on every server; without claims Apache had several in 46 rounds of 60.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING

from replica.storage.base import OWN
from replica.storage.faults import place
from rules.errors import Busy, StorageError, TargetExists, Transient

if TYPE_CHECKING:
    from replica.storage.webdav import WebdavStorage

CLAIMS = f"{OWN}/publish"
#: A holder that has not sent its MOVE by then gives up.
_HOLD_SECONDS = 60.0
#: A claim seen for so long has lost its holder: its MOVE was sent long ago, and its wait for the answer has ended.
_STALE_SECONDS = 300.0
_WAIT_SECONDS = 10.0
#: A token is given up before `collect` could take it for one left behind.
_TOKEN_SECONDS = 3600.0
_COLLECT_SECONDS = 3 * _TOKEN_SECONDS


class Held:
    """A claim that is held now."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        #: A MOVE was sent, and not answered yet.
        self.moving = False

    @contextmanager
    def move(self, storage: WebdavStorage, path: str) -> Iterator[None]:
        """Around the one MOVE that the claim is for. Left by an error, it is not known what became of it."""
        if time.monotonic() - self._since > _HOLD_SECONDS:
            raise storage.error(Transient, path, "publishing took too long, and others may have gone on")
        self.moving = True
        yield
        self.moving = False


class Claims:
    def __init__(self, storage: WebdavStorage) -> None:
        self._storage = storage
        #: Folders of ours that are not in use: who, and when it was made.
        self._free: list[tuple[str, float]] = []
        #: Claims of others that are in our way: whose, and since when.
        self._seen: dict[str, tuple[str, float]] = {}

    @asynccontextmanager
    async def holding(self, final: str) -> AsyncIterator[Held]:
        """TargetExists: there is something by now. Busy: somebody else publishes there."""
        who, made = await self._token()
        claim = f"{CLAIMS}/{hashlib.sha256(final.encode()).hexdigest()[:32]}"
        try:
            who, made = await self._claim(claim, who, made, final)
        except TargetExists:
            self._free.append((who, made))
            raise
        held = Held()
        try:
            yield held
        finally:
            # While our MOVE may still be under way at the server the claim must outlive it: then it is left to be
            # found stale.
            if not held.moving:
                background = self._storage.http.pool().background
                giving = asyncio.get_running_loop().create_task(self._give_back(claim, who, made))
                background.add(giving)
                giving.add_done_callback(background.discard)
                await asyncio.shield(giving)

    async def _claim(self, claim: str, who: str, made: float, final: str) -> tuple[str, float]:
        storage = self._storage
        deadline = time.monotonic() + _WAIT_SECONDS
        pause = 0.01
        while True:
            try:
                refusal = await storage.move(_own(who), claim, folder=True)
            except Transient as error:
                refusal = error  # whether it arrived is seen below
            if refusal is None:
                return who, made
            if await storage.look(final) is not None:
                raise storage.exists(final)
            holder = await self._holder(claim)
            if holder == who:
                return who, made  # the answer to our MOVE was lost
            if holder is None:
                # Given back meanwhile; or our own folder was tidied up by somebody.
                if await storage.look(_own(who), folder=True) is None:
                    who, made = await self._make()
            elif holder != "?" and self._is_stale(claim, holder):
                await self._break(claim, holder)
            if time.monotonic() > deadline:
                if holder is None:
                    raise refusal
                busy = Busy(
                    f"{place(storage.name, final)}: somebody else publishes there",
                    hint="if that process died, its claim ends in five minutes",
                    endpoint=storage.name,
                    path=final,
                    side="target",
                )
                busy.retry_after_seconds = _STALE_SECONDS if holder else None
                raise busy
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.5)

    async def _holder(self, claim: str) -> str | None:
        """Whose claim it is; None: nobody's; "?": it changed while we looked (rclone breaks off its listing then)."""
        try:
            async with aclosing(self._storage.children(claim)) as children:
                async for path, _, _ in children:
                    return path.rpartition("/")[2]
        except Transient:
            return "?"
        return None

    def _is_stale(self, claim: str, holder: str) -> bool:
        """Seen by our own clock: no other is trusted. What another process saw, it breaks itself."""
        seen, since = self._seen.get(claim, ("", 0.0))
        if seen != holder:
            while len(self._seen) > 1000:
                self._seen.pop(next(iter(self._seen)))
            self._seen[claim] = (holder, time.monotonic())
            return False
        return time.monotonic() - since > _STALE_SECONDS

    async def _break(self, claim: str, holder: str) -> None:
        storage = self._storage
        away = f"{CLAIMS}/broken-{secrets.token_hex(8)}"
        if await storage.move(claim, away, folder=True) is not None:
            return
        self._seen.pop(claim, None)
        if await self._holder(away) != holder:
            await storage.move(away, claim, folder=True)  # broken by somebody else, and claimed anew: not ours to take
            return
        await self._remove(away)

    # ── folders to claim with ────────────────────────────────────────────────────────────────────────────────────────

    async def _token(self) -> tuple[str, float]:
        while self._free:
            with suppress(IndexError):  # another thread was faster
                who, made = self._free.pop()
                if time.monotonic() - made < _TOKEN_SECONDS:
                    return who, made
                with suppress(StorageError):
                    await self._remove(_own(who))
        return await self._make()

    async def _make(self) -> tuple[str, float]:
        who = secrets.token_hex(8)
        await self._storage.make_folders(_own(who))
        await self._storage.put_small(f"{_own(who)}/{who}", b"")
        return who, time.monotonic()

    async def _give_back(self, claim: str, who: str, made: float) -> None:
        # What stays behind when this fails harms nobody: there is something under that name, and who asks sees it.
        with suppress(StorageError):
            if await self._storage.move(claim, _own(who), folder=True) is None:
                self._free.append((who, made))

    async def _remove(self, folder: str) -> None:
        """A folder of ours: not every server deletes one with something in it."""
        paths = [path async for path, _, _ in self._storage.children(folder)]
        for path in paths:
            await self._storage.remove(path)
        await self._storage.remove(folder, folder=True)

    async def collect(self, limit_ns: float) -> None:
        """Remove what processes that died have left behind."""
        limit_ns = min(limit_ns, await self._storage.now_ns() - _COLLECT_SECONDS * 1e9)
        stale = [p async for p, found, _ in self._storage.children(CLAIMS) if found.mtime_ns <= limit_ns]
        for folder in stale:
            await self._remove(folder)

    async def close(self) -> None:
        free, self._free = self._free, []
        with suppress(StorageError):
            for who, _ in free:
                await self._remove(_own(who))


def _own(who: str) -> str:
    return f"{CLAIMS}/free-{who}"
