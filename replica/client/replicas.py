"""Replicas: which file is at which endpoint."""

from __future__ import annotations

from collections.abc import Iterator

from replica import wire
from replica.client.calls import Call, at, at_did
from replica.client.http import SyncHttp
from rules.names import Did


class Replicas:
    def __init__(self, http: SyncHttp) -> None:
        self._http = http

    def register(self, registration: wire.Registration) -> wire.Registered:
        return self._http.send(register(registration))

    def locate(self, did: str | Did) -> Iterator[wire.Replica]:
        """The replicas of a file, or of all files in a dataset or container; as many as there are, as a stream."""
        return self._http.lines(locate(did))

    def pages(self, did: str | Did) -> Iterator[wire.Replica]:
        """The same page by page: slower, and with no connection kept open by a slow reader."""
        return self._http.pages(Call("GET", at_did(did, "replicas"), wire.Page[wire.Replica]))


def register(registration: wire.Registration) -> Call[wire.Registered]:
    return Call("POST", at("replicas"), wire.Registered, registration, creates=True)


def locate(did: str | Did) -> Call[wire.Replica]:
    return Call("GET", at_did(did, "replicas"), wire.Replica)
