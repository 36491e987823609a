"""Whether replicas are still what they were: doubts, verdicts, scrubs; and the looks that workers take.

A claim is never repeated by itself: what an answer that got lost had leased comes back when its lease ends. A beat or
a report says what is so: saying it again changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from replica import wire
from replica.client.calls import Call, at, printable
from replica.client.http import SyncHttp
from rules.names import Did


class Integrity:
    def __init__(self, http: SyncHttp) -> None:
        self._http = http

    def suspects(self, endpoint: str | None = None) -> Iterator[wire.Suspect]:
        """What is doubted and what is bad."""
        return self._http.pages(Call("GET", at("suspects"), wire.Page[wire.Suspect], query={"endpoint": endpoint}))

    def bad(self, dids: Sequence[str | Did], endpoint: str, *, reason: str, repair: bool = False) -> wire.BadDeclared:
        said = wire.BadReplicas(endpoint=endpoint, dids=[str(did) for did in dids], reason=reason, repair=repair)
        return self._http.send(Call("POST", at("replicas", "bad"), wire.BadDeclared, said, repeatable=True))

    def good(self, dids: Sequence[str | Did], endpoint: str) -> wire.GoodDeclared:
        said = wire.GoodReplicas(endpoint=endpoint, dids=[str(did) for did in dids])
        return self._http.send(Call("POST", at("replicas", "good"), wire.GoodDeclared, said, repeatable=True))

    def doubt(self, doubts: Sequence[wire.DoubtedReplica]) -> wire.DoubtsTaken:
        """These were read, and were wrong or missing: workers of their sites look."""
        told = [msgspec.structs.replace(one, reason=printable(one.reason)[:500]) for one in doubts]
        return self._http.send(Call("POST", at("replicas", "doubted"), wire.DoubtsTaken, wire.Doubts(replicas=told)))

    def repair(self, did: str | Did, endpoint: str) -> wire.Transfer:
        wish = wire.RepairWish(did=str(did), endpoint=endpoint)
        return self._http.send(Call("POST", at("replicas", "repair"), wire.Transfer, wish, creates=True))

    def scrubs(self) -> list[wire.Scrub]:
        return self._http.send(Call("GET", at("scrubs"), wire.Scrubs)).items

    def scrub(self, endpoint: str) -> wire.Scrub:
        return self._http.send(Call("GET", at("scrubs", endpoint), wire.Scrub))

    def set_scrub(self, endpoint: str, **change: Any) -> wire.Scrub:
        """What shall change, by the names of wire.ScrubChange."""
        return self._http.send(Call("PATCH", at("scrubs", endpoint), wire.Scrub, wire.ScrubChange(**change)))


def claim_call(claim: wire.CheckClaim) -> Call[wire.Checks]:
    return Call("POST", at("orders", "checks", "claim"), wire.Checks, claim)


def heartbeat_call(heartbeat: wire.CheckHeartbeat) -> Call[wire.CheckBeatAnswer]:
    return Call("POST", at("orders", "checks", "heartbeat"), wire.CheckBeatAnswer, heartbeat, repeatable=True)


def report_call(report: wire.CheckReport) -> Call[wire.CheckAnswer]:
    probes = [_printable(finding) for finding in report.probes]
    scrub = report.scrub
    if scrub is not None:
        findings = [_printable(finding) for finding in scrub.findings]
        scrub = msgspec.structs.replace(scrub, findings=findings, trouble=printable(scrub.trouble))
    said = wire.CheckReport(worker=report.worker, probes=probes, scrub=scrub)
    return Call("POST", at("orders", "checks", "report"), wire.CheckAnswer, said, repeatable=True)


def _printable(finding: wire.CheckOutcome) -> wire.CheckOutcome:
    return msgspec.structs.replace(finding, message=printable(finding.message))
