"""A centre of a few lines that speaks the orders' part of replica.wire and misbehaves on command.

The real one is used in the scenario tests; this one exists because a real one cannot be told to fall silent after a
claim, to answer late or to forget a lease.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import xxhash
from aiohttp import web

from replica import wire
from replica.storage.posix import PosixStorage

TOKEN = "rpl_site-token-for-tests"


class Centre:
    def __init__(self, *, lease_seconds: float = 30.0) -> None:
        self.lease_seconds = lease_seconds
        self.queue: list[wire.Order] = []
        #: (transfer, epoch) → until when, by the monotonic clock.
        self.leases: dict[tuple[int, int], float] = {}
        self.orders: dict[int, wire.Order] = {}
        self.outcomes: list[wire.Outcome] = []
        self.reports: list[int] = []
        self.beats: list[wire.Beat] = []
        self.claims: list[tuple[float, int]] = []
        self.space: dict[str, int] = {}
        #: Replicas to remove: waiting, in somebody's hands, and what became of them.
        self.deletions: list[wire.DeletionOrder] = []
        self.deleting: dict[tuple[int, int], wire.DeletionOrder] = {}
        self.deletion_outcomes: list[wire.DeletionOutcome] = []
        self.calls: Counter[str] = Counter()
        self.stop: set[int] = set()
        #: What to do instead of answering, by the last word of the path: a status, or "hang", or "reset".
        self.trouble: dict[str, int | str] = {}
        #: Do it, then lose the answer.
        self.lose_answer: set[str] = set()
        self.token = TOKEN
        self.url = ""

    def add(self, order: wire.Order) -> None:
        self.orders[order.transfer] = order
        self.queue.append(order)

    def requeue_lost(self) -> int:
        """What the real centre's leases pass does."""
        now = time.monotonic()
        lost = [key for key, until in self.leases.items() if until < now]
        for transfer, epoch in lost:
            del self.leases[transfer, epoch]
            self.queue.append(self.orders[transfer])
        return len(lost)

    async def wait_for(self, outcomes: int, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while len(self.outcomes) < outcomes:
            assert time.monotonic() < deadline, f"{len(self.outcomes)} of {outcomes} outcomes: {self.outcomes[-3:]}"
            await asyncio.sleep(0.01)

    # --- serving

    async def __aenter__(self) -> Centre:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/api/v1/orders/{what}", self._orders)
        app.router.add_post("/api/v1/orders/deletions/{what}", self._deletions)
        app.router.add_post("/api/v1/orders/scans/{what}", self._scans)
        app.router.add_post("/api/v1/orders/checks/{what}", self._checks)
        app.router.add_post("/api/v1/endpoints/{name}/{what}", self._space)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._runner.cleanup()

    async def _hurdles(self, request: web.Request, what: str) -> web.Response | None:
        self.calls[what] += 1
        trouble = self.trouble.get(what) or self.trouble.get("*")
        if trouble == "hang":
            await asyncio.sleep(3600)
        if trouble == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=500)
        if isinstance(trouble, int):
            return _problem(trouble, {503: "unavailable", 400: "invalid", 401: "not_authenticated"}[trouble])
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return _problem(401, "not_authenticated")
        return None

    async def _orders(self, request: web.Request) -> web.Response:
        what = request.match_info["what"]
        if (refused := await self._hurdles(request, what)) is not None:
            return refused
        body = await request.read()
        answer: Any = {"claim": self._claim, "heartbeat": self._heartbeat, "report": self._report}[what](body)
        if what in self.lose_answer:
            assert request.transport is not None
            request.transport.abort()
        if isinstance(answer, web.Response):
            return answer
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

    async def _deletions(self, request: web.Request) -> web.Response:
        what = request.match_info["what"]
        if (refused := await self._hurdles(request, f"deletions.{what}")) is not None:
            return refused
        body = await request.read()
        answer: Any
        match what:
            case "claim":
                limit = msgspec.json.decode(body, type=wire.DeletionClaim).limit
                taken, self.deletions = self.deletions[:limit], self.deletions[limit:]
                orders = [msgspec.structs.replace(order, epoch=order.epoch + 1) for order in taken]
                self.deleting.update({(o.deletion, o.epoch): o for o in orders})
                answer = wire.DeletionOrders(orders=orders, lease_seconds=self.lease_seconds, more=bool(self.deletions))
            case "heartbeat":
                beats = msgspec.json.decode(body, type=wire.DeletionHeartbeat).beats
                gone = [
                    b.deletion for b in beats if (b.deletion, b.epoch) not in self.deleting or b.deletion in self.stop
                ]
                answer = wire.HeartbeatAnswer(lease_seconds=self.lease_seconds, stop=gone)
            case _:
                outcomes = msgspec.json.decode(body, type=wire.DeletionReport).outcomes
                known = [o for o in outcomes if self.deleting.pop((o.deletion, o.epoch), None) is not None]
                self.deletion_outcomes += known
                stale = [o.deletion for o in outcomes if o not in known]
                answer = wire.ReportAnswer(accepted=len(known), stale=stale)
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

    async def _scans(self, request: web.Request) -> web.Response:
        """There is nothing to scan."""
        if (refused := await self._hurdles(request, f"scans.{request.match_info['what']}")) is not None:
            return refused
        work = wire.ScanWork(scan=None, dark=[], lease_seconds=self.lease_seconds)
        return web.Response(body=msgspec.json.encode(work), content_type="application/json")

    async def _checks(self, request: web.Request) -> web.Response:
        """Nothing is ever looked at here: tests/workers/test_checking.py has the real centre for that."""
        if (refused := await self._hurdles(request, f"checks.{request.match_info['what']}")) is not None:
            return refused
        answer = wire.Checks(probes=[], scrub=None, lease_seconds=self.lease_seconds, again_seconds=3600.0)
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

    async def _space(self, request: web.Request) -> web.Response:
        if (refused := await self._hurdles(request, "space")) is not None:
            return refused
        self.space[request.match_info["name"]] = (await request.json())["free_bytes"]
        return web.Response(status=204)

    def _claim(self, body: bytes) -> wire.Orders:
        claim = msgspec.json.decode(body, type=wire.Claim)
        taken: list[wire.Order] = []
        size = 0
        while self.queue and len(taken) < claim.limit:
            order = self.queue[0]
            if taken and claim.limit_bytes is not None and size + order.size > claim.limit_bytes:
                break
            size += order.size
            order = msgspec.structs.replace(order, epoch=order.epoch + 1)
            self.queue.pop(0)
            self.orders[order.transfer] = order
            self.leases[order.transfer, order.epoch] = time.monotonic() + self.lease_seconds
            taken.append(order)
        self.claims.append((time.monotonic(), len(taken)))
        return wire.Orders(orders=taken, lease_seconds=self.lease_seconds, more=bool(self.queue))

    def _heartbeat(self, body: bytes) -> wire.HeartbeatAnswer:
        heartbeat = msgspec.json.decode(body, type=wire.Heartbeat)
        self.beats += heartbeat.beats
        stop = []
        for beat in heartbeat.beats:
            key = (beat.transfer, beat.epoch)
            if key not in self.leases or beat.transfer in self.stop:
                stop.append(beat.transfer)
            else:
                self.leases[key] = time.monotonic() + self.lease_seconds
        return wire.HeartbeatAnswer(lease_seconds=self.lease_seconds, stop=stop)

    def _report(self, body: bytes) -> Any:
        report = msgspec.json.decode(body, type=wire.Report)
        if any("refuse me" in outcome.message for outcome in report.outcomes):
            return _problem(400, "invalid")
        self.reports.append(len(report.outcomes))
        stale = []
        for outcome in report.outcomes:
            if self.leases.pop((outcome.transfer, outcome.epoch), None) is None:
                stale.append(outcome.transfer)
            else:
                self.outcomes.append(outcome)
        return wire.ReportAnswer(accepted=len(report.outcomes) - len(stale), stale=stale)


def _problem(status: int, code: str) -> web.Response:
    problem = wire.Problem(type="about:blank", title=code, status=status, detail=f"the test says {code}", code=code)
    return web.Response(status=status, body=msgspec.json.encode(problem), content_type="application/problem+json")


class World:
    """Endpoints on this machine, files in them, and the orders to copy them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._next = 0

    async def endpoint(self, name: str) -> Path:
        path = self.directory / name
        await PosixStorage(path, name=name).prepare()
        return path

    def order(
        self,
        path: str,
        content: bytes | None,
        *,
        sources: tuple[str, ...] = ("SOURCE",),
        target: str = "TARGET",
        checksums: dict[str, str] | None = None,
        write_at: tuple[str, ...] | None = None,
        size: int | None = None,
    ) -> wire.Order:
        """An order to copy `content`, which is written to the sources (or to `write_at`). None: write nothing."""
        self._next += 1
        for name in sources if write_at is None else write_at:
            if content is not None:
                file = self.directory / name / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        content = content if content is not None else b"never written"
        return wire.Order(
            transfer=self._next,
            epoch=0,
            did=f"test:{path}",
            size=len(content) if size is None else size,
            checksums={"xxh3_128": xxhash.xxh3_128_hexdigest(content)} if checksums is None else checksums,
            target_endpoint=target,
            target_url=self.url(target),
            target_path=path,
            sources=[wire.OrderSource(endpoint=name, url=self.url(name), path=path) for name in sources],
            attempt=1,
        )

    def deletion(
        self, path: str, content: bytes | None, *, size: int | None = -1, at: str = "TARGET"
    ) -> wire.DeletionOrder:
        """An order to remove `content`, which is written there. None: write nothing."""
        self._next += 1
        if content is not None:
            file = self.directory / at / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return wire.DeletionOrder(
            deletion=self._next,
            epoch=0,
            did=f"test:{path}",
            generation=1,
            endpoint=at,
            url=self.url(at),
            path=path,
            size=len(content or b"") if size == -1 else size,
        )

    def url(self, name: str) -> str:
        return (self.directory / name).as_uri()
