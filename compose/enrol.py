"""Makes the sites of compose.yaml known, once: an endpoint each, and the token that lets the site's worker in.

Given     SITE=DIRECTORY=TOKEN-FILE …; the API's URL and the administrator's token.
Returns   exit code 0 when every site, endpoint and token is there.
Promises  safe to run at any time and again: what is there stays, a token that still works is kept. Waits for the API
          and for the token file instead of relying on the order in which containers start.
Partner   the services `migrate` (writes the administrator's token), `api`, and the workers, which read their token.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from replica import wire
from replica.client import Client
from replica.client.places import prepare_here
from rules.errors import AlreadyExists, Invalid, ReplicaError, Unavailable

PATIENCE_SECONDS = 120.0


def say(text: str) -> None:
    print(f"enrol: {text}", flush=True)


def administrator(server: str, token_file: Path) -> Client:
    """A client that the API answers; waits for both the token and the API."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    said = ""
    while True:
        try:
            client = Client(server, token_file.read_text().strip())
            client.whoami()
        except (FileNotFoundError, Unavailable) as error:
            waiting = f"waiting: {error}"
            if waiting != said:
                say(said := waiting)
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return client


def enrol(client: Client, site: str, directory: str, key: Path, server: str) -> None:
    try:
        client.sites.add(site)
        say(f"site {site} is new")
    except AlreadyExists:
        say(f"site {site} is known")
    try:
        endpoint = client.endpoints.add(wire.NewEndpoint(name=f"{site}-DISK", site=site, url=Path(directory).as_uri()))
        say(f"endpoint {site}-DISK is new: {directory}")
    except AlreadyExists:
        endpoint = client.endpoints.show(f"{site}-DISK")
        say(f"endpoint {site}-DISK is known")
    if endpoint.used_bytes == 0:
        # The API has no disks: who adds an endpoint marks, where the disk is, that this directory is it. Never again
        # once it holds replicas: then a directory without the mark is a disk that is not mounted.
        prepare_here(endpoint)
    if not works(server, key):
        # Whole or not at all, and never readable by others: a worker may be looking at this moment.
        part = key.with_name(f".{key.name}.{os.getpid()}")
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(client.sites.key(site).token + "\n")
        part.rename(key)
        say(f"token of {site} is in {key}")


def works(server: str, key: Path) -> bool:
    """A token of an older database, which was removed, is there and does not work."""
    try:
        client = Client(server, key.read_text().strip())
        client.whoami()
    except (OSError, Invalid):
        return False
    except Unavailable:
        raise
    except ReplicaError:
        return False
    return True


def main(words: list[str]) -> int:
    server = os.environ["REPLICA_SERVER"]
    try:
        client = administrator(server, Path(os.environ["REPLICA_TOKEN_FILE"]))
        for word in words:
            site, directory, key = word.split("=")
            enrol(client, site, directory, Path(key), server)
    except (ReplicaError, OSError) as error:
        say(f"failed: {error}")
        return 1
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
