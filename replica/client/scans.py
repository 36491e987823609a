"""Scans: whether endpoints hold what the catalogue says, and nothing else; and the orders of the workers.

A claim is never repeated by itself: what an answer that got lost had leased comes back when its lease ends. All else
says what is so: saying it again changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any, TypeVar

import msgspec

from replica import wire
from replica.client.calls import NOTHING, Call, at
from replica.client.http import SyncHttp
from replica.storage.comparing import Comparison, Dark, Missing

T = TypeVar("T")


class Scans:
    def __init__(self, http: SyncHttp) -> None:
        self._http = http

    def start(
        self,
        endpoint: str,
        *,
        accept_fraction: bool = False,
        listing: bool = False,
        listed_at: datetime | None = None,
    ) -> wire.Scan:
        """Begin a scan or join the one under way; with `accept_fraction` one that is held goes on."""
        new = wire.NewScan(endpoint=endpoint, accept_fraction=accept_fraction, listing=listing, listed_at=listed_at)
        return self._http.send(Call("POST", at("scans"), wire.Scan, new, creates=True))

    def list(self, endpoint: str | None = None) -> Iterator[wire.Scan]:
        """The newest first."""
        return self._http.pages(Call("GET", at("scans"), wire.Page[wire.Scan], query={"endpoint": endpoint}))

    def show(self, scan: int) -> wire.Scan:
        return self._http.send(Call("GET", at("scans", scan), wire.Scan))

    def findings(self, scan: int, kind: str | None = None) -> Iterator[wire.Finding]:
        path = at("scans", scan, "findings")
        return self._http.pages(Call("GET", path, wire.Page[wire.Finding], query={"kind": kind}))

    def accept(self, scan: int) -> wire.Scan:
        return self._http.send(Call("POST", at("scans", scan, "accept"), wire.Scan, repeatable=True))

    def remove_dark(self, scan: int) -> wire.Scan:
        """What is dark and confirmed goes to quarantine."""
        return self._http.send(Call("POST", at("scans", scan, "remove-dark"), wire.Scan, repeatable=True))

    # For who carries a scan out himself.

    def known(self, part: wire.ScanPart) -> wire.KnownPart:
        return self._http.send(_said("scans", "known", wire.KnownPart, part))

    def found(self, found: wire.ScanFindings) -> None:
        self._http.send(_said("scans", "found", NOTHING, found))

    def compared(self, compared: wire.ScanCompared) -> wire.Scan:
        return self._http.send(_said("scans", "compared", wire.Scan, compared))

    def failed(self, failed: wire.ScanFailed) -> wire.Scan:
        return self._http.send(_said("scans", "failed", wire.Scan, failed))


def know(comparison: Comparison, known: Sequence[wire.Known]) -> None:
    for it in known:
        comparison.know(it.file, it.generation, it.size, it.expected, it.path)


def told_of(scan: int, epoch: int, some: Sequence[Missing | Dark]) -> wire.ScanFindings:
    """Differences as the server takes them."""
    return wire.ScanFindings(
        scan=scan,
        epoch=epoch,
        missing=[wire.MissingFile(**asdict(it)) for it in some if isinstance(it, Missing)],
        dark=[wire.DarkFile(**asdict(it)) for it in some if isinstance(it, Dark)],
    )


def claim_call(claim: wire.ScanClaim) -> Call[wire.ScanWork]:
    return Call("POST", at("orders", "scans", "claim"), wire.ScanWork, claim)


def order_call(what: str, answer: type[T], body: msgspec.Struct) -> Call[T]:
    return _said("orders/scans", what, answer, body)


def _said(base: str, what: str, answer: type[T], body: Any) -> Call[T]:
    return Call("POST", at(*base.split("/"), what), answer, body, repeatable=True)
