"""`replica upload` and `replica download` beside `rclone copy`, through the same server on loopback.

    python -m tests.benchmarks.bench_client webdav|apache|s3|posix [--files 2000] [--large 512] [--rounds 3] [--dir DIR]

Both are whole processes, from their start to their end, in turns; each of ours also asks and tells a catalogue (SQLite,
in this process, whose time is in ours). Ours hashes all bytes, reads back what it wrote and syncs it; rclone compares
checksums where the server has any, and syncs nothing. Prints JSON: the median of the ratios of the seconds (above 1:
ours is faster), and CPU seconds (user and system) of the two clients.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from replica import wire
from replica.client.places import prepare
from replica.db import schema
from replica.db.engine import Database
from replica.storage.credentials import Credentials
from tests.servers_dav import Apache, Rclone
from tests.servers_s3 import ACCESS_KEY, SECRET_KEY, SETTINGS, RcloneS3, find_rclone
from tests.service import serving

ROOT = Path(__file__).parents[2]
FILE_BYTES = 10 << 10


def timed(command: list[object], environ: dict[str, str]) -> tuple[float, float]:
    """Seconds, and CPU seconds, of a process that must succeed."""
    mine = {key: value for key, value in os.environ.items() if key != "AWS_CA_BUNDLE"}  # rclone fails on it
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=mine | environ, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{command[:6]}: {done.returncode}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


class Bench:
    def __init__(self, kind: str, scratch: Path, stack: ExitStack) -> None:
        self.kind, self.scratch = kind, scratch
        server: Any = {"webdav": Rclone, "apache": Apache, "s3": RcloneS3}.get(kind, lambda: None)()
        if server is not None:
            stack.callback(server.remove)
            server.start()
        settings: dict[str, str] = {}
        if kind in ("webdav", "apache"):
            url = f"{server.url}/here"
            settings = {"atomic_move": "yes"} if kind == "webdav" else {}  # rclone checks and renames in one step
            self.peer = [f"--webdav-url={server.url}", ":webdav:peer"]
        elif kind == "s3":
            server.client().create_bucket(Bucket="bucket")
            url, settings = server.url("bucket", "here"), SETTINGS
            keys = [f"--s3-access-key-id={ACCESS_KEY}", f"--s3-secret-access-key={SECRET_KEY}"]
            self.peer = ["--s3-provider=Other", f"--s3-endpoint={server.endpoint}", *keys, ":s3:bucket/peer"]
        else:
            url = (scratch / "here").as_uri()
            self.peer = [str(scratch / "peer")]
        database_url = f"sqlite:///{scratch / 'replica.db'}"
        database = Database(database_url)
        stack.callback(database.close)
        schema.migrate(database)
        service = stack.enter_context(serving(database))
        secrets = scratch / "credentials.toml"
        secrets.write_text(f"[{json.dumps(url)}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items()))
        secrets.chmod(0o600)
        with service.client() as client:
            client.scopes.add("p1")
            made = client.endpoints.add(wire.NewEndpoint(name="FAR", site="DESY", url=url))
            asyncio.run(prepare(made, Credentials.load(secrets)))
        self.environ = {
            "REPLICA_SERVER": service.url,
            "REPLICA_TOKEN": service.admin,
            "REPLICA_CREDENTIALS_FILE": str(secrets),
        }

    def ours(self, *words: object) -> tuple[float, float]:
        return timed([sys.executable, "-m", "replica", *words, "-o", "json"], self.environ)

    def theirs(self, source: list[str], target: list[str]) -> tuple[float, float]:
        flags = ["--config", "/dev/null", "--transfers", "16", "--checkers", "16"]
        return timed([find_rclone(), "copy", *flags, *source, *target], {})

    def measure(self, what: str, content: Path, rounds: int) -> dict[str, Any]:
        """`content` holds a folder for each round, for names are taken once."""
        told: dict[str, list[tuple[tuple[float, float], tuple[float, float]]]] = {"upload": [], "download": []}
        for number in range(rounds):
            folder = content / str(number)
            *flags, place = self.peer
            there = [*flags, f"{place}/{what}{number}"]
            data = f"{what}{number}"
            mine = self.ours("upload", folder, "--scope", "p1", "--dataset", data, "--endpoint", "FAR")
            told["upload"].append((mine, self.theirs([str(folder)], there)))
            back, peers_back = self.scratch / "back", self.scratch / "peers_back"
            mine = self.ours("download", f"p1:{data}", "--dir", back)
            told["download"].append((mine, self.theirs(there, [str(peers_back)])))
            for one in (back, peers_back):
                shutil.rmtree(one)
        return {
            verb: {
                "ratio": round(statistics.median(theirs[0] / ours[0] for ours, theirs in pairs), 2),
                "seconds": [round(statistics.median(p[side][0] for p in pairs), 2) for side in (0, 1)],
                "cpu_seconds": [round(statistics.median(p[side][1] for p in pairs), 2) for side in (0, 1)],
            }
            for verb, pairs in told.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kind", choices=["webdav", "apache", "s3", "posix"])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--large", type=int, default=512, help="MiB of the large file; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", help="where the files lie")
    asked = parser.parse_args()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=asked.dir, prefix="bench-client-")))
        small, large = scratch / "small", scratch / "large"
        for number in range(asked.rounds):
            folder = small / str(number) / f"s{number}"
            folder.mkdir(parents=True)
            for n in range(asked.files):
                (folder / f"{n:05}.dat").write_bytes(os.urandom(FILE_BYTES))
            if asked.large:
                folder = large / str(number) / f"l{number}"
                folder.mkdir(parents=True)
                block = os.urandom(1 << 20)
                with (folder / "big").open("wb") as file:
                    for n in range(asked.large):
                        file.write(n.to_bytes(8, "little") + block[8:])
        bench = Bench(asked.kind, scratch, stack)
        result: dict[str, Any] = {"kind": asked.kind}
        result[f"{asked.files} x 10 KiB"] = bench.measure("small", small, asked.rounds)
        if asked.large:
            result[f"{asked.large} MiB"] = bench.measure("large", large, asked.rounds)
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
