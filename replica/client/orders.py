"""Orders: what a site's worker claims, keeps alive and reports. The site is in the token.

Claiming twice gives two sets of orders, so a claim is never repeated by itself; what an answer that got lost had
leased comes back when its lease ends. A beat or a report says what is so: saying it again changes nothing.
"""

from __future__ import annotations

import msgspec

from replica import wire
from replica.client.calls import Call, at, printable
from replica.client.http import SyncHttp


class Orders:
    def __init__(self, http: SyncHttp) -> None:
        self._http = http

    def claim(self, claim: wire.Claim) -> wire.Orders:
        return self._http.send(claim_call(claim))

    def heartbeat(self, heartbeat: wire.Heartbeat) -> wire.HeartbeatAnswer:
        return self._http.send(heartbeat_call(heartbeat))

    def report(self, report: wire.Report) -> wire.ReportAnswer:
        return self._http.send(report_call(report))


def claim_call(claim: wire.Claim) -> Call[wire.Orders]:
    return Call("POST", at("orders", "claim"), wire.Orders, claim)


def heartbeat_call(heartbeat: wire.Heartbeat) -> Call[wire.HeartbeatAnswer]:
    return Call("POST", at("orders", "heartbeat"), wire.HeartbeatAnswer, heartbeat, repeatable=True)


def report_call(report: wire.Report) -> Call[wire.ReportAnswer]:
    outcomes = [msgspec.structs.replace(outcome, message=printable(outcome.message)) for outcome in report.outcomes]
    said = wire.Report(worker=report.worker, outcomes=outcomes)
    return Call("POST", at("orders", "report"), wire.ReportAnswer, said, repeatable=True)
