"""Deletions: copies that nobody protects, on their way out; and the orders of the workers that remove them.

A claim is never repeated by itself, as with transfers: what an answer that got lost had leased comes back when its
lease ends. A beat or a report says what is so: saying it again changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from replica import wire
from replica.client.calls import Call, at, printable
from replica.client.http import SyncHttp
from rules.names import Did


class Deletions:
    def __init__(self, http: SyncHttp) -> None:
        self._http = http

    def list(
        self,
        state: str | None = None,
        endpoint: str | None = None,
        did: str | Did | None = None,
        site: str | None = None,
    ) -> Iterator[wire.Deletion]:
        query = {"state": state, "endpoint": endpoint, "did": None if did is None else str(did), "site": site}
        return self._http.pages(Call("GET", at("deletions"), wire.Page[wire.Deletion], query=query))

    def show(self, deletion: int) -> wire.Deletion:
        return self._http.send(Call("GET", at("deletions", deletion), wire.Deletion))

    def ask(self, did: str | Did, endpoint: str, *, last_copy: bool = False) -> wire.Deletion:
        """One copy shall go. What a rule protects stays; so does the last good copy, unless `last_copy` is said."""
        new = wire.NewDeletion(did=str(did), endpoint=endpoint, last_copy=last_copy)
        return self._http.send(Call("POST", at("deletions"), wire.Deletion, new, creates=True))

    def undo(self, deletion: int) -> wire.Deletion:
        """Take it back, as long as no worker has begun."""
        return self._http.send(Call("POST", at("deletions", deletion, "undo"), wire.Deletion))

    def claim(self, claim: wire.DeletionClaim) -> wire.DeletionOrders:
        return self._http.send(claim_call(claim))

    def heartbeat(self, heartbeat: wire.DeletionHeartbeat) -> wire.HeartbeatAnswer:
        return self._http.send(heartbeat_call(heartbeat))

    def report(self, report: wire.DeletionReport) -> wire.ReportAnswer:
        return self._http.send(report_call(report))


def claim_call(claim: wire.DeletionClaim) -> Call[wire.DeletionOrders]:
    return Call("POST", at("orders", "deletions", "claim"), wire.DeletionOrders, claim)


def heartbeat_call(heartbeat: wire.DeletionHeartbeat) -> Call[wire.HeartbeatAnswer]:
    return Call("POST", at("orders", "deletions", "heartbeat"), wire.HeartbeatAnswer, heartbeat, repeatable=True)


def report_call(report: wire.DeletionReport) -> Call[wire.ReportAnswer]:
    outcomes = [msgspec.structs.replace(outcome, message=printable(outcome.message)) for outcome in report.outcomes]
    said = wire.DeletionReport(worker=report.worker, outcomes=outcomes)
    return Call("POST", at("orders", "deletions", "report"), wire.ReportAnswer, said, repeatable=True)
