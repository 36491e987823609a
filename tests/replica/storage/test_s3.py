"""S3, against two real servers: the shipped suite, and what is special to objects."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Iterator

import aiohttp
import pytest

from replica.storage import s3, s3_multipart
from replica.storage.base import OWN, PARTS, Storage, SupportsPresigned, SupportsServerCopy, part_path
from replica.storage.conformance import StorageConformance, listed, pattern, read_all, refusal, write
from replica.storage.copy import Expected, copy_file, measure
from replica.storage.credentials import Credentials
from replica.storage.memory import MemoryStorage, forget
from replica.storage.registry import open_storage
from rules.errors import Forbidden, Invalid, Refused, SourceMissing, TargetExists, Unreachable
from tests.servers_s3 import SETTINGS, Moto, RcloneS3, S3Server

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def moto() -> Iterator[S3Server]:
    yield from _running(Moto())


@pytest.fixture(scope="module")
def rclone() -> Iterator[S3Server]:
    yield from _running(RcloneS3())


def _running(server: S3Server) -> Iterator[S3Server]:
    try:
        server.start()
        yield server
    finally:
        server.remove()


class BehindBucket:
    """conformance.Behind for a prefix of a bucket, by a client that is not ours."""

    def __init__(self, server: S3Server, bucket: str, prefix: str = "") -> None:
        self.client, self.bucket, self.base = server.client(), bucket, f"{prefix}/" if prefix else ""
        self.away: dict[str, bytes] = {}

    def put(self, path: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self.base + path, Body=content)

    def get(self, path: str) -> bytes | None:
        try:
            return self.client.get_object(Bucket=self.bucket, Key=self.base + path)["Body"].read()
        except self.client.exceptions.NoSuchKey:
            return None

    def remove(self, path: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self.base + path)

    def flip(self, path: str, at: int = 0) -> None:
        content = bytearray(self.get(path))
        content[at] ^= 1
        self.put(path, bytes(content))

    def paths(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.base)
        return sorted(line["Key"].removeprefix(self.base) for page in pages for line in page.get("Contents", ()))

    def uploads(self) -> list[str]:
        return [u["Key"] for u in self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", ())]

    def vanish(self) -> None:
        """Nothing of it is there any more, and then the bucket is not."""
        self.away = {path: self.get(path) for path in self.paths()}
        for path in self.away:
            self.remove(path)
        self.client.delete_bucket(Bucket=self.bucket)

    def return_(self) -> None:
        self.client.create_bucket(Bucket=self.bucket)
        for path, content in self.away.items():
            self.put(path, content)


class Place:
    """A bucket of its own, and storages opened on it."""

    def __init__(self, server: S3Server, prefix: str = "") -> None:
        self.server, self.prefix, self.bucket = server, prefix, f"bucket-{next(_numbers)}"
        server.client().create_bucket(Bucket=self.bucket)
        self.behind = BehindBucket(server, self.bucket, prefix)
        self.opened: list[Storage] = []

    async def open(self, name: str = "store", prefix: str | None = None) -> s3.S3Storage:
        url = self.server.url(self.bucket, self.prefix if prefix is None else prefix)
        storage = open_storage(url, name=name, credentials=Credentials({self.server.url(self.bucket): SETTINGS}))
        self.opened.append(storage)
        await storage.prepare()
        return storage

    async def close(self) -> None:
        for storage in self.opened:
            await storage.close()


class S3Conformance(StorageConformance):
    #: S3 advises against control characters, and moto's server loses them: the adapter takes none.
    refused_paths = frozenset({"line\nbreak"})

    @pytest.fixture
    def behind(self, place):
        return place.behind

    @pytest.fixture
    async def storage(self, place):
        return await place.open()

    async def test_it_keeps_the_contract(self, storage):
        assert isinstance(storage, Storage)
        assert isinstance(storage, SupportsServerCopy)
        assert isinstance(storage, SupportsPresigned)


class TestMoto(S3Conformance):
    @pytest.fixture
    async def place(self, moto):
        place = Place(moto)
        yield place
        await place.close()

    async def test_it_is_seen_what_the_server_does(self, storage):
        able = await storage._abilities()
        assert (able.put_new, able.copy_new, able.complete_new, able.checksums) == (True, False, True, False)


class TestRclone(S3Conformance):
    @pytest.fixture
    async def place(self, rclone):
        place = Place(rclone, "a/prefix")
        yield place
        await place.close()

    async def test_it_is_seen_what_the_server_does(self, storage):
        able = await storage._abilities()
        assert (able.put_new, able.copy_new, able.complete_new, able.checksums) == (False, False, False, False)
