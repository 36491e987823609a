"""The copy of one file through the contract, whatever the two storages are.

Given     two storages and a path at each, what the catalogue knows of the bytes, and a tag for the temporary.
Returns   Copied, as replica.storage.copy says; the steps and their promises are told there.
Promises  those of replica.storage.copy. A target that compares a digest in the very act that gives the name
          (SupportsDirect) gets no temporary and is not read back: steps 4 to 7 are that one act.
Partner   replica.storage.copy, which knows the faster ways of particular pairs.

Two ways through the same steps:

    quickly    for a file of at most QUICK_BYTES whose strong checksum the catalogue knows. The source is not looked at
               before or after: what was read has the catalogue's size and checksums, so it is the file, whoever wrote
               to the source meanwhile. Where publishing itself tells who has the name (SupportsDirect), or looking
               costs more than a few bytes moved in vain (SupportsFewQuestions), nobody looks for it before.
               Whatever does not agree, or cannot be read, blames nobody: it is looked at again with care.
    carefully  the source is looked at before and after, and what has the name already is adopted first.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import cast

from replica.storage import faultpoints, servercopy
from replica.storage.adoption import adopt_existing, publish_by
from replica.storage.base import (
    Piece,
    Storage,
    SupportsDirect,
    SupportsFewQuestions,
    SupportsServerCopy,
    Unseen,
    part_path,
    supports,
)
from replica.storage.faults import blaming
from replica.storage.hashing import Fingerprint, Hasher, is_strong
from replica.storage.judging import (
    NO_LOOK_BYTES_MAX,
    Control,
    Copied,
    Expected,
    changed,
    differs,
    exactly,
    expect,
    expect_size,
    needed,
    same,
)
from replica.storage.pieces import closing
from replica.storage.posix import PosixStorage
from rules.checksums import Agreement, Checksums
from rules.errors import Busy, ReplicaError, StorageError, TimedOut, Unreachable

QUICK_BYTES = 16 << 20
#: Whoever says this will not say more if he is asked at once.
_NO_ANSWER = (Busy, TimedOut, Unreachable)


class _LookAgain(Exception):
    """What was read is not what the catalogue knows; whose fault that is, is not known yet."""


@dataclass(slots=True)
class Stream:
    source: Storage
    source_path: str
    target: Storage
    target_path: str
    tag: str
    expected: Expected | None
    control: Control
    permit: Callable[[], None] | None
    began: float = 0.0

    async def run(self) -> Copied:
        self.began = time.perf_counter()
        if self._quick:
            with suppress(_LookAgain):
                return await self._quickly()
            self.control.bytes_done, self.control.phase = 0, "moving"
        return await self._carefully()

    @property
    def _quick(self) -> bool:
        known = self.expected
        if known is None or known.size_bytes > QUICK_BYTES or self.source.url == self.target.url:
            return False
        if supports(self.source, SupportsServerCopy) and supports(self.target, SupportsServerCopy):
            return False  # the server may do it alone
        return is_strong(known.checksums)

    @property
    def _publishing_looks(self) -> bool:
        """Whether nobody looks at the name before the bytes move: publishing sees what has it, and moving a few bytes
        in vain costs less than asking for each file."""
        if supports(self.target, SupportsDirect):
            return True
        assert self.expected is not None
        return self.expected.size_bytes <= NO_LOOK_BYTES_MAX and supports(self.target, SupportsFewQuestions)

    # ── the two ways ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _quickly(self) -> Copied:
        assert self.expected is not None
        size_bytes = self.expected.size_bytes

        async def agree(hasher: Hasher) -> None:
            assert self.expected is not None
            agreement = hasher.checksums().compare(self.expected.checksums)
            if hasher.size_bytes != size_bytes or agreement is not Agreement.AGREE:
                raise _LookAgain

        if supports(self.source, SupportsFewQuestions):
            cast(SupportsFewQuestions, self.source).believed(self.source_path, size_bytes)
        unlooked = self._publishing_looks
        try:
            adopted = None if unlooked else await self._adopted()
            return adopted or await self._copied(size_bytes, agree)
        except StorageError as error:
            if error.side == "source":
                raise _LookAgain from None
            if not unlooked or isinstance(error, _NO_ANSWER):
                raise
            adopted = None
            with suppress(StorageError):
                adopted = await self._adopted()  # what lies there already needs no room
            if adopted is None:
                raise
            return adopted

    async def _carefully(self) -> Copied:
        source, path, expected, control = self.source, self.source_path, self.expected, self.control
        adopted = await self._adopted()
        if adopted is not None:
            return adopted
        with blaming("source"):
            before = await source.stat(path)
            expect_size(source, path, before.size_bytes, expected)
            control.check()

        async def agree(hasher: Hasher) -> None:
            with blaming("source"):
                after = await source.stat(path)
                if after.etag != before.etag or hasher.size_bytes != after.size_bytes:
                    raise changed(source, path)
                expect(source, path, hasher, expected)

        async def by_server(part: str, algorithms: tuple[str, ...]) -> Hasher | None:
            known = expected.checksums if expected is not None else Checksums()
            return await servercopy.copied(source, path, before, self.target, part, known, algorithms, control.check)

        return await self._copied(before.size_bytes, agree, by_server)

    async def _adopted(self) -> Copied | None:
        return await adopt_existing(
            self.source,
            self.source_path,
            self.target,
            self.target_path,
            self.expected,
            self.control,
            self.permit,
        )

    # ── the steps ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _copied(
        self,
        size_bytes: int,
        agree: Callable[[Hasher], Awaitable[None]],
        by_server: Callable[[str, tuple[str, ...]], Awaitable[Hasher | None]] | None = None,
    ) -> Copied:
        part = part_path(f"{self.tag}.{secrets.token_hex(6)}")
        unseen: Unseen | None = None
        published = False
        try:
            algorithms = needed(self.expected)
            hasher = seen = await by_server(part, algorithms) if by_server is not None else None
            if hasher is None:
                hasher = Hasher((*algorithms, *await servercopy.digests_of(self.target, size_bytes)))
                unseen = await self._sent(part, size_bytes, hasher)
            await agree(hasher)
            faultpoints.reach("after_write")
            with blaming("target"):
                self.control.phase = "verifying"
                verified_by = "read back" if seen is not None or unseen is not None else await self._prove(part, hasher)
                faultpoints.reach("after_verify")

                async def give() -> None:
                    nonlocal verified_by
                    if unseen is None:
                        await self.target.publish(part, self.target_path)
                    else:
                        verified_by = f"digest {await unseen.publish(hasher.checksums())}"

                there = await publish_by(
                    give, self.target, self.target_path, exactly(hasher), self.control, self.permit
                )
                if there is not None:
                    return there
                published = True
                faultpoints.reach("after_publish")
                return Copied(
                    hasher.size_bytes,
                    hasher.checksums(),
                    False,
                    time.perf_counter() - self.began,
                    verified_by,
                    moved_bytes=hasher.size_bytes,
                )
        finally:
            if unseen is not None:
                await unseen.drop()
            elif not published:
                # A failure here hides no better error: what stays is collected by age. After a publish there is nothing
                # of that name any more.
                with suppress(ReplicaError):
                    await self.target.delete(part)

    async def _sent(self, part: str, size_bytes: int, hasher: Hasher) -> Unseen | None:
        """The bytes are at the target, in the temporary or (Unseen) without it."""
        hashed = partial(_hashed, self.source, self.source_path, size_bytes, hasher, self.control)
        with blaming("target"):
            if supports(self.target, SupportsDirect):
                async with closing(hashed()) as pieces:
                    unseen = await cast(SupportsDirect, self.target).send(
                        self.target_path, pieces, size_bytes=size_bytes
                    )
                if unseen is not None:
                    return unseen
            async with closing(hashed()) as pieces:
                if supports(self.target, SupportsFewQuestions):
                    await cast(SupportsFewQuestions, self.target).write_new(part, pieces, size_bytes=size_bytes)
                else:
                    await self.target.write(part, pieces, size_bytes=size_bytes)
        return None

    async def _prove(self, part: str, hasher: Hasher) -> str:
        target = self.target
        for known in () if isinstance(target, PosixStorage) else hasher.checksums():  # a file system has none
            answered = await target.checksum(part, known.algorithm)
            if answered is not None:
                if answered.lower().rjust(len(known.value), "0") != known.value:
                    raise differs(target, part, known.algorithm, answered, known.value, "target")
                return f"digest {known.algorithm}"
        again = Fingerprint()
        async with closing(target.read(part)) as pieces:
            async for piece in pieces:
                self.control.check()
                again.update(piece)
        same(target, part, again, hasher)
        return "read back"


async def _hashed(
    source: Storage, path: str, size_bytes: int, hasher: Hasher, control: Control
) -> AsyncIterator[Piece]:
    """What the target writes: the source's bytes, hashed as they pass. Errors in here are the source's."""
    with blaming("source"):
        async with closing(source.read(path)) as pieces:
            async for piece in pieces:
                control.check()
                hasher.update(piece)
                if hasher.size_bytes > size_bytes:
                    raise changed(source, path)  # it grows while we read; it might never end
                yield faultpoints.through(memoryview(piece))
                control.bytes_done = hasher.size_bytes
        if hasher.size_bytes < size_bytes:
            raise changed(source, path)
