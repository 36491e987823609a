"""Scans over REST: for people, and for the workers of a site that carry them out."""

from __future__ import annotations

from replica import wire
from replica.api.at_site import at_site
from replica.api.paging import Paging, Word
from replica.api.routing import Context, Routes
from replica.catalog import dark, scanning, scans

routes = Routes("scans", "Whether endpoints hold what the catalogue says, and nothing else.")


class Search(Paging):
    endpoint: Word | None = None


@routes.get("/scans", "scan.read")
async def list_(context: Context, query: Search) -> wire.Page[wire.Scan]:
    """List scans, the newest first."""
    return await context.read(scans.list_page, query.endpoint, query.cursor, query.limit)


@routes.post("/scans", "scan.write", status=201)
async def start(context: Context, body: wire.NewScan) -> wire.Scan:
    """Scan an endpoint, or join the scan that is under way."""
    return await context.write(scans.start, context.actor, body, context.facts.scans)


@routes.get("/scans/{scan}", "scan.read")
async def show(context: Context, scan: int) -> wire.Scan:
    """Show a scan."""
    return await context.read(scans.get, scan)


class Kind(Paging):
    kind: Word | None = None


@routes.get("/scans/{scan}/findings", "scan.read")
async def findings(context: Context, scan: int, query: Kind) -> wire.Page[wire.Finding]:
    """List what a scan found; kept of the last two scans of each endpoint."""
    return await context.read(scans.list_findings, scan, query.kind, query.cursor, query.limit)


@routes.post("/scans/{scan}/accept", "scan.write")
async def accept(context: Context, scan: int) -> wire.Scan:
    """Say that so much is missing or dark indeed, of a scan that is held."""
    return await context.write(scans.accept, context.actor, scan, context.facts.scans)


@routes.post("/scans/{scan}/remove-dark", "scan.write")
async def remove_dark(context: Context, scan: int) -> wire.Scan:
    """Have the dark files that are confirmed moved to quarantine."""
    return await context.write(dark.ask, context.actor, scan)


# --- a person lists what is there -----------------------------------------------------------------------------------


@routes.post("/scans/known", "scan.write", keyed=False)
async def known(context: Context, body: wire.ScanPart) -> wire.KnownPart:
    """What the catalogue knows at the endpoint, in parts: for who carries the scan out himself."""
    return await context.write(scanning.known, None, body)


@routes.post("/scans/found", "scan.write", bulk=True, keyed=False)
async def found(context: Context, body: wire.ScanFindings) -> None:
    """Tell a part of what a comparison came to, for who carries the scan out himself."""
    await context.write(scanning.found, None, body)


@routes.post("/scans/compared", "scan.write", keyed=False)
async def compared(context: Context, body: wire.ScanCompared) -> wire.Scan:
    """Tell that all was compared, for who carries the scan out himself."""
    return await context.write(scanning.compared, None, body, policy=context.facts.scans)


@routes.post("/scans/failed", "scan.write", keyed=False)
async def failed(context: Context, body: wire.ScanFailed) -> wire.Scan:
    """Tell that it could not be done, for who carries the scan out himself."""
    return await context.write(scanning.failed, None, body)


# --- workers --------------------------------------------------------------------------------------------------------


@routes.post("/orders/scans/claim", "orders.work")
async def claim(context: Context, body: wire.ScanClaim) -> wire.ScanWork:
    """Take a scan at the own site, or dark files to be moved away, with a lease and an epoch."""
    lease = context.facts.lease_seconds
    return await context.write(at_site, context.site, scanning.claim, body, lease_seconds=lease)


@routes.post("/orders/scans/heartbeat", "orders.work")
async def heartbeat(context: Context, body: wire.ScanBeat) -> wire.HeartbeatAnswer:
    """Keep the lease of a scan, tell how far it is."""
    lease = context.facts.lease_seconds
    return await context.write(at_site, context.site, scanning.heartbeat, body, lease_seconds=lease)


@routes.post("/orders/scans/known", "orders.work")
async def site_known(context: Context, body: wire.ScanPart) -> wire.KnownPart:
    """What the catalogue knows at the endpoint that is scanned, in parts."""
    return await context.read(scanning.known_at, context.site, body)


@routes.post("/orders/scans/found", "orders.work", bulk=True)
async def site_found(context: Context, body: wire.ScanFindings) -> None:
    """Tell a part of what a comparison came to."""
    await context.write(at_site, context.site, scanning.found, body)


@routes.post("/orders/scans/compared", "orders.work")
async def site_compared(context: Context, body: wire.ScanCompared) -> wire.Scan:
    """Tell that all was listed and compared."""
    return await context.write(at_site, context.site, scanning.compared, body, policy=context.facts.scans)


@routes.post("/orders/scans/probed", "orders.work", bulk=True)
async def probed(context: Context, body: wire.ProbeReport) -> wire.Probes:
    """Tell what a second look found, hear what to look for next."""
    return await context.write(at_site, context.site, scanning.probed, body)


@routes.post("/orders/scans/failed", "orders.work")
async def site_failed(context: Context, body: wire.ScanFailed) -> wire.Scan:
    """Tell that a scan could not be done, or give it back."""
    return await context.write(at_site, context.site, scanning.failed, body)


@routes.post("/orders/scans/dark", "orders.work", bulk=True)
async def dark_report(context: Context, body: wire.DarkReport) -> wire.ReportAnswer:
    """Tell what became of dark files."""
    return await context.write(at_site, context.site, dark.report, body)
