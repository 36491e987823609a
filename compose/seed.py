"""The demo world: files of an experiment at DESY, a dataset of them, and the wish for two copies at different sites.

Given     the API and the administrator's token; SEED_FILES files of 64 KiB and one of SEED_LARGE_MIB MiB.
Returns   exit code 0 when the rule is ok: every file is at both sites, verified.
Promises  speaks to the system through replica.client alone, as any user would; a second run finds everything there.
          The bytes follow from the names, so that anybody can check them: `expected`.
Partner   the service `seed` of compose.yaml; compose/in-containers and the tests compare the disks with `expected`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from replica.client import Client

SCOPE = "demo"
DATASET = "demo:run-17"
ENDPOINT = "DESY-DISK"
SMALL_BYTES = 64 << 10
PATIENCE_SECONDS = 120.0
WAIT_SECONDS = 600.0


def pieces(name: str, size_bytes: int) -> Iterator[bytes]:
    """The bytes of a file, which its name decides; no two pieces are equal."""
    block = random.Random(name).randbytes(min(size_bytes, 1 << 20))
    for number in range(0, size_bytes, 1 << 20):
        yield (number.to_bytes(8, "big") + block[8:])[: size_bytes - number]


def names(files: int, large_bytes: int) -> Iterator[tuple[str, int]]:
    """Every file by its name within the scope, with its size: nested, with spaces and Unicode, as data are."""
    for number in range(files):
        yield f"run 17/detector-{number % 4}/Ereignis {number:05}.h5", SMALL_BYTES
    yield "run 17/calibration µ.h5", large_bytes


def expected(files: int, large_bytes: int) -> dict[str, str]:
    """What must be at both sites in the end: path below `demo/` → SHA-256."""
    digests = {}
    for name, size_bytes in names(files, large_bytes):
        digest = hashlib.sha256()
        for piece in pieces(name, size_bytes):
            digest.update(piece)
        digests[name] = digest.hexdigest()
    return digests


def say(text: str) -> None:
    print(f"seed: {text}", flush=True)


def main() -> int:
    # Imported here: who wants `expected` needs nothing of Replica.
    from rules.errors import ReplicaError

    try:
        return seed(int(os.environ["SEED_FILES"]), int(os.environ["SEED_LARGE_MIB"]) << 20)
    except (ReplicaError, OSError) as error:
        say(f"failed: {error}")
        return 1


def seed(files: int, large_bytes: int) -> int:
    from replica import wire
    from replica.client.upload import upload
    from rules.errors import AlreadyExists

    started = time.monotonic()
    client = demo_world()
    with contextlib.suppress(AlreadyExists):
        client.scopes.add(SCOPE)
    with tempfile.TemporaryDirectory() as directory:
        for name, size_bytes in names(files, large_bytes):
            path = Path(directory, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.writelines(pieces(name, size_bytes))
        done = upload(client, [directory], scope=SCOPE, dataset=DATASET, endpoint=ENDPOINT)
    if done.failed:
        say(f"failed: {done.failed[0].did}: {done.failed[0].reason}")
        return 1
    say(f"{done.files} files at {ENDPOINT} in {DATASET}, {done.adopted} of them were there already")

    rule = next(client.rules.list(did=DATASET), None)
    if rule is None:
        rule = client.rules.add(wire.NewRule(did=DATASET, expression="kind=disk", copies=2, spread="site"))
        say(f"rule {rule.id}: two copies on disks of different sites")
    deadline = time.monotonic() + WAIT_SECONDS
    while rule.state != "ok":
        if time.monotonic() > deadline:
            say("failed: the rule is not ok: " + " ".join(client.rules.explain(rule.id).sentences))
            return 1
        time.sleep(0.2)
        rule = client.rules.show(rule.id)
    say(f"rule {rule.id} is ok: {rule.files_available} files are at two sites, {time.monotonic() - started:.1f} s")
    return 0


def demo_world() -> Client:
    """A client, as soon as the API answers and DESY is enrolled: containers start in any order."""
    from replica.client import Client
    from rules.errors import NotAuthenticated, NotFound, Unavailable

    deadline = time.monotonic() + PATIENCE_SECONDS
    said = ""
    while True:
        try:
            client = Client(os.environ["REPLICA_SERVER"], Path(os.environ["REPLICA_TOKEN_FILE"]).read_text().strip())
            client.endpoints.show(ENDPOINT)
        except (FileNotFoundError, NotAuthenticated, NotFound, Unavailable) as error:
            waiting = f"waiting: {error}"
            if waiting != said:
                say(said := waiting)
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return client


if __name__ == "__main__":
    sys.exit(main())
