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

    def list(
        self,
        scope: str | None = None,
        pattern: str | None = None,
        kind: str | None = None,
        *,
        where: str | None = None,
        sort: str | None = None,
        deleted: bool = False,
    ) -> Iterator[wire.Did]:
        """`pattern` is a name in which `*` stands for anything, `where` a condition (see rules.conditions)."""
        query = {"scope": scope, "pattern": pattern, "kind": kind, "where": where, "sort": sort}
        query["deleted"] = "true" if deleted else None
        return self._http.pages(Call("GET", at("dids"), wire.Page[wire.Did], query=query))

    def show(self, did: str | Did, *, deleted: bool = False) -> wire.Did:
        query = {"deleted": "true"} if deleted else {}
        return self._http.send(Call("GET", at_did(did), wire.Did, query=query))

    def change(self, did: str | Did, change: wire.DidChange) -> wire.Did:
        return self._http.send(Call("PATCH", at_did(did), wire.Did, change))

    def delete(self, dids: Iterable[str | Did]) -> wire.Deleted:
        """All of them or none, at most as many as one call takes."""
        return self._http.send(Call("DELETE", at("dids"), wire.Deleted, _list(dids)))

    def undelete(self, dids: Iterable[str | Did]) -> wire.Undeleted:
        return self._http.send(Call("POST", at("dids", "undelete"), wire.Undeleted, _list(dids), repeatable=True))

    def history(self, did: str | Did) -> Iterator[wire.HistoryEntry]:
        return self._http.pages(Call("GET", at_did(did, "history"), wire.Page[wire.HistoryEntry]))

    def metadata(self, did: str | Did) -> wire.Metadata:
        return self._http.send(Call("GET", at_did(did, "metadata"), wire.Metadata))

    def change_metadata(self, did: str | Did, change: wire.MetadataChange) -> wire.Metadata:
        return self._http.send(Call("PATCH", at_did(did, "metadata"), wire.Metadata, change))

    def change_metadata_of_many(self, changes: Iterable[wire.MetadataOf]) -> wire.MetadataChanged:
        """Any number; sent in parts of the size that the server takes, each of which is whole or not at all."""
        changed = 0
        rest = iter(changes)
        while part := [*islice(rest, wire.BULK_MAX)]:
            call = Call("PATCH", at("dids", "metadata"), wire.MetadataChanged, wire.MetadataChanges(changes=part))
            changed += self._http.send(call).changed
        return wire.MetadataChanged(changed=changed)

    def contents(self, did: str | Did) -> Iterator[wire.Did]:
        return self._http.pages(Call("GET", at_did(did, "contents"), wire.Page[wire.Did]))

    def attach(self, parent: str | Did, children: Iterable[str | Did]) -> wire.Attached:
        """Any number; sent in parts of the size that the server takes, each of which is whole or not at all."""
        attached = 0
        for part in _parts(children):
            call = Call("POST", at_did(parent, "contents"), wire.Attached, part, creates=True)
            attached += self._http.send(call).attached
        return wire.Attached(attached=attached)

    def attach_all(self, attachments: Iterable[wire.Attaching]) -> wire.Attached:
        """Several parents at once: all of it or nothing."""
        body = wire.Attachments(attachments=[*attachments])
        return self._http.send(Call("POST", at("dids", "attachments"), wire.Attached, body, creates=True))

    def detach(self, parent: str | Did, children: Iterable[str | Did]) -> wire.Detached:
        detached = 0
        for part in _parts(children):
            detached += self._http.send(Call("DELETE", at_did(parent, "contents"), wire.Detached, part)).detached
        return wire.Detached(detached=detached)


def _list(dids: Iterable[str | Did]) -> wire.DidList:
    return wire.DidList(dids=[str(did) for did in dids])


def _parts(dids: Iterable[str | Did]) -> Iterator[wire.Attachment]:
    rest = iter(dids)
    while part := [str(did) for did in islice(rest, wire.BULK_MAX)]:
        yield wire.Attachment(dids=part)
