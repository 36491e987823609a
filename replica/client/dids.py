"""DIDs: datasets, containers and files, and what is in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from replica import wire
from replica.client.calls import Call, at, at_did
from replica.client.http import SyncHttp
from rules.names import Did


class Dids:
    def __init__(self, http: SyncHttp) -> None:
        self._http = http

    def add(self, did: wire.NewDid) -> wire.Did:
        return self._http.send(Call("POST", at("dids"), wire.Did, did, creates=True))

    def list(self, scope: str, pattern: str | None = None, kind: str | None = None) -> Iterator[wire.Did]:
        """Of a scope; `pattern` is a name in which `*` stands for anything."""
        query = {"scope": scope, "pattern": pattern, "kind": kind}
        return self._http.pages(Call("GET", at("dids"), wire.Page[wire.Did], query=query))

    def show(self, did: str | Did) -> wire.Did:
        return self._http.send(Call("GET", at_did(did), wire.Did))

    def change(self, did: str | Did, change: wire.DidChange) -> wire.Did:
        return self._http.send(Call("PATCH", at_did(did), wire.Did, change))

    def contents(self, did: str | Did) -> Iterator[wire.Did]:
        return self._http.pages(Call("GET", at_did(did, "contents"), wire.Page[wire.Did]))

    def attach(self, parent: str | Did, children: Iterable[str | Did]) -> wire.Attached:
        """Any number; sent in parts of the size that the server takes, each of which is whole or not at all."""
        attached = 0
        for part in _parts(children):
            call = Call("POST", at_did(parent, "contents"), wire.Attached, part, creates=True)
            attached += self._http.send(call).attached
        return wire.Attached(attached=attached)

    def detach(self, parent: str | Did, children: Iterable[str | Did]) -> wire.Detached:
        detached = 0
        for part in _parts(children):
            detached += self._http.send(Call("DELETE", at_did(parent, "contents"), wire.Detached, part)).detached
        return wire.Detached(detached=detached)


def _parts(dids: Iterable[str | Did]) -> Iterator[wire.Attachment]:
    rest = iter(dids)
    while part := [str(did) for did in islice(rest, wire.BULK_MAX)]:
        yield wire.Attachment(dids=part)
