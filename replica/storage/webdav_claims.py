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

Who has published stays on the claim for a moment: his next claim moves the folder from there, which is one request in
place of two. That is in nobody's way, for under that name is a file now, and who asks sees it.

Whether a server keeps `Overwrite: F` is found out once, with two temporaries. One that does needs no look of ours
between claim and MOVE; it looks itself, and nobody else of ours can come between its look and its rename.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from replica.storage.base import OWN, PARTS
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
#: So long a folder may stay on the claim of what was published. With the time that a claim is held it must be far
#: below `_STALE_SECONDS`.
_PARKED_SECONDS = 1.0


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


@dataclass(slots=True, eq=False)
class _Token:
    """A folder of ours to claim with."""

    who: str
    made: float
    #: Where it lies: at its own place, or on the claim of what was published last.
    at: str
    #: It was sent elsewhere, and nobody knows whether it went: it is not claimed with again, for it might still go.
    doubtful: bool = False


class Claims:
    def __init__(self, storage: WebdavStorage) -> None:
        self._storage = storage
        #: Those that are not in use.
        self._free: list[_Token] = []
        self._server_looks: bool | None = None
        #: Claims of others that are in our way: whose, and since when.
        self._seen: dict[str, tuple[str, float]] = {}

    async def server_looks(self) -> bool:
        """Does the server keep `Overwrite: F`? As long as that cannot be found out: no."""
        if self._server_looks is None:
            pool = self._storage.http.pool()
            if pool.trying is None:
                pool.trying = asyncio.get_running_loop().create_task(self._try_to_replace())
            self._server_looks = await asyncio.shield(pool.trying)
            pool.trying = None
        return bool(self._server_looks)

    async def _try_to_replace(self) -> bool | None:
        storage = self._storage
        one, two = (f"{PARTS}/probe-{secrets.token_hex(8)}" for _ in range(2))
        try:
            await storage.put_small(one, b"")
            await storage.put_small(two, b"")
            refusal = await storage.move(one, two)
            both = await storage.look(one) is not None and await storage.look(two) is not None
            return isinstance(refusal, TargetExists) and both
        except StorageError:
            return None
        finally:
            for path in (one, two):
                with suppress(StorageError):  # what stays is collected by age
                    await storage.remove(path)

    @asynccontextmanager
    async def holding(self, final: str) -> AsyncIterator[Held]:
        """TargetExists: there is something by now. Busy: somebody else publishes there."""
        claim = f"{CLAIMS}/{hashlib.sha256(final.encode()).hexdigest()[:32]}"
        await self._bring_home(claim)
        token = await self._token()
        try:
            await self._claim(claim, token, final)
        except BaseException:
            self._in_background(self._give_back(token, claim))
            raise
        held = Held()
        try:
            yield held
        except BaseException:
            # While our MOVE may still be under way at the server the claim must outlive it: then it is left to be
            # found stale.
            if not held.moving:
                await asyncio.shield(self._in_background(self._give_back(token)))
            raise
        self._park(token)

    async def _claim(self, claim: str, token: _Token, final: str) -> None:
        storage = self._storage
        deadline = time.monotonic() + _WAIT_SECONDS
        pause = 0.01
        while True:
            token.doubtful = True
            try:
                refusal = await storage.move(token.at, claim, folder=True)
                token.doubtful = False
            except Transient as error:
                refusal = error  # whether it arrived is seen below
            if refusal is None:
                token.at = claim
                return
            if await storage.look(final) is not None:
                raise storage.exists(final)
            holder = await self._holder(claim)
            if holder == token.who:
                token.at, token.doubtful = claim, False  # the answer to our MOVE was lost
                return
            if holder is None:
                # Given back meanwhile; or our own folder was tidied up by somebody, or its disk is not mounted.
                if await storage.look(token.at, folder=True) is None:
                    made = await self._make()
                    token.who, token.made, token.at, token.doubtful = made.who, made.made, made.at, False
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

    async def _token(self) -> _Token:
        while self._free:
            with suppress(IndexError):  # another thread was faster
                token = self._free.pop()
                if time.monotonic() - token.made < _TOKEN_SECONDS:
                    return token
                await self._throw_away(token)
        return await self._make()

    async def _make(self) -> _Token:
        await self._storage.present()
        who = secrets.token_hex(8)
        await self._storage.make_folders(_own(who))
        await self._storage.put_small(f"{_own(who)}/{who}", b"")
        return _Token(who, time.monotonic(), _own(who))

    def _park(self, token: _Token) -> None:
        """Leave it on the claim, for a moment."""
        self._free.append(token)
        asyncio.get_running_loop().call_later(_PARKED_SECONDS, self._end_parking, token, token.at)

    def _end_parking(self, token: _Token, at: str) -> None:
        if token.at == at and self._take(token):
            self._in_background(self._give_back(token))

    async def _bring_home(self, claim: str) -> None:
        """If we are still on that claim, begin anew: others may have seen us there since long."""
        while (token := next((token for token in self._free if token.at == claim), None)) is not None:
            if self._take(token):
                await asyncio.shield(self._in_background(self._give_back(token)))

    def _take(self, token: _Token) -> bool:
        with suppress(ValueError):  # somebody else has it
            self._free.remove(token)
            return True
        return False

    async def _give_back(self, token: _Token, wanted: str = "") -> None:
        """Bring it home from where it lies, or from the claim that it was `wanted` for, if it went there after all."""
        # What stays behind when this fails is found stale, if anybody wants that name while there is nothing under it.
        with suppress(StorageError):
            home = _own(token.who)
            if token.doubtful and wanted and await self._holder(wanted) == token.who:
                token.at = wanted
            if token.at == home or await self._storage.move(token.at, home, folder=True) is None:
                token.at = home
                if not token.doubtful:
                    self._free.append(token)

    async def _throw_away(self, token: _Token) -> None:
        """From its own place only: on a claim, somebody else may come between the file and its folder."""
        with suppress(StorageError):
            home = _own(token.who)
            if token.at == home or await self._storage.move(token.at, home, folder=True) is None:
                await self._remove(home)

    def _in_background(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        background = self._storage.http.pool().background
        task = asyncio.get_running_loop().create_task(work)
        background.add(task)
        task.add_done_callback(background.discard)
        return task

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
        for token in free:
            await self._throw_away(token)


def _own(who: str) -> str:
    return f"{CLAIMS}/free-{who}"
