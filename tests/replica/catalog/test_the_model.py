"""Any sequence of acts leaves the catalogue without contradiction, and in the end as a small model says.

After every step fsck finds nothing and World.check recounts everything. At the end nothing fails any more, all work is
done, and what users may rely on is compared with tests/replica/catalog/model.py. More of it by hand:
`python -m tests.scenarios.long_model`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, TypeVar

import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from replica import wire
from replica.catalog import accounts, deletions, dids, endpoints, fsck, quotas, removals, replicas, rule_updates, rules
from replica.db import tables
from replica.db.engine import Database
from rules.errors import Invalid, NotFound, Refused
from rules.names import Did
from rules.permissions import Actor, Role
from rules.transfers import RetryPolicy
from tests.conftest import HandClock
from tests.replica.catalog.model import EXPRESSIONS, Model, Place, Refusal, Seen, Wish
from tests.replica.catalog.world import KB, LEASE, ROOT, World, done, failed, size_of

POLICY = RetryPolicy(attempts_max=3, base_seconds=30, cap_seconds=600)
PLACES = ("A-1", "A-2", "B-1", "C-1")
DATASETS = ("t:d0", "t:d1", "t:d2")
CONTAINERS = ("t:c0", "t:c1")
#: In so many rounds, each of two days, everything that can come true does.
ROUNDS = 6

F = TypeVar("F", bound=Callable[..., None])
#: Makes an empty database, and takes it away.
Make = Callable[[], tuple[Database, Callable[[], None]]]

datasets, containers = st.sampled_from(DATASETS), st.sampled_from(CONTAINERS)
collections = st.sampled_from(DATASETS + CONTAINERS)
places = st.sampled_from(PLACES)
small = st.integers(0, 9)


#: Everything that can be done: its name, how often compared with the others, and with what.
ACTS: dict[str, tuple[int, dict[str, st.SearchStrategy[Any]]]] = {}


def act(weight: int, **strategies: st.SearchStrategy[Any]) -> Callable[[F], F]:
    def enter(function: F) -> F:
        ACTS[function.__name__] = weight, strategies
        return function

    return enter


def nothing(faults: Iterable[str]) -> None:
    found = list(faults)
    assert not found, "\n".join(found)


class Catalogue(RuleBasedStateMachine):
    """Both, side by side."""

    make: Make
    #: What all stories together did: a story in which nothing happens shows nothing.
    done: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.clock = HandClock()
        self.db, self._remove = self.make()
        self.db.clock = self.clock
        self.world = World(self.db)
        self.model = Model({name: Place(name, name[0]) for name in PLACES})
        for name in PLACES:
            self.world.endpoint(name)
        with self.db.write() as s:
            accounts.add(s, wire.NewAccount(name="ann"))
        for did in DATASETS:
            self.world.collection(did[2:])
            self.model.datasets[did] = set()
        for did in CONTAINERS:
            self.world.collection(did[2:], "container")
            self.model.containers[did] = set()
        self.orders: dict[str, list[wire.Order]] = {name[0]: [] for name in PLACES}
        self.removals: dict[str, list[wire.DeletionOrder]] = {name[0]: [] for name in PLACES}
        self.names = itertools.count()

    def both(self, model: Callable[[], Any], real: Callable[[], Any]) -> Any:
        """Do it in both; what the model refuses, the catalogue must refuse, and nothing else."""
        why = ""
        try:
            model()
        except Refusal as refusal:
            why = str(refusal)
        if not why:
            return real()
        try:
            real()
        except (Refused, Invalid):
            return None
        raise AssertionError(f"not refused: {why}")

    def some_files(self, which: list[int]) -> list[str]:
        known = sorted(self.model.sizes)
        return sorted({known[i % len(known)] for i in which}) if known else []

    @initialize()
    def begin(self) -> None:
        """Something to begin with, or half of the steps would have nothing to work on."""
        self.register(3, "A-1", "t:d0")
        self.register(2, "B-1", "t:d1")
        self.register(1, "C-1", None)
        self.nest("t:c0", "t:d0")
        self.wish("t:c0", 2, "*", "dataset", "site", None, "root")
        self.wish("t:d1", 1, "site=A|site=C", "none", "endpoint", None, "ann")

    # --- contents -----------------------------------------------------------------------------------------------------

    @act(3, count=st.integers(1, 3), place=places, dataset=st.none() | datasets)
    def register_new(self, count: int, place: str, dataset: str | None) -> None:
        self.register(count, place, dataset)

    def register(self, count: int, place: str, dataset: str | None) -> None:
        files = [f"t:f{next(self.names):03}" for _ in range(count)]
        self.both(
            lambda: self.model.register(files, size_of, place, dataset),
            lambda: self.world.register(files, place, dataset),
        )

    @act(2, which=st.lists(small, min_size=1, max_size=3), place=places, dataset=st.none() | datasets)
    def register_again(self, which: list[int], place: str, dataset: str | None) -> None:
        if files := self.some_files(which):
            self.both(
                lambda: self.model.register(files, size_of, place, dataset),
                lambda: self.world.register(files, place, dataset),
            )

    @act(3, parent=datasets, which=st.lists(small, min_size=1, max_size=4))
    def attach_files(self, parent: str, which: list[int]) -> None:
        if files := self.some_files(which):
            self.both(lambda: self.model.attach(parent, files), lambda: self.world.attach(parent, *files))

    @act(2, parent=datasets, which=st.lists(small, min_size=1, max_size=4))
    def detach_files(self, parent: str, which: list[int]) -> None:
        if files := self.some_files(which):
            self.both(lambda: self.model.detach(parent, files), lambda: self.world.detach(parent, *files))

    @act(2, parent=containers, child=collections)
    def put_in(self, parent: str, child: str) -> None:
        self.nest(parent, child)

    def nest(self, parent: str, child: str) -> None:
        self.both(lambda: self.model.attach(parent, [child]), lambda: self.world.attach(parent, child))

    @act(1, parent=containers, child=collections)
    def take_out(self, parent: str, child: str) -> None:
        self.both(lambda: self.model.detach(parent, [child]), lambda: self.world.detach(parent, child))

    @act(1, did=collections, is_open=st.sampled_from([True, True, False]))
    def close_or_reopen(self, did: str, is_open: bool) -> None:
        (self.model.reopen if is_open else self.model.close)(did)
        with self.db.write() as s:
            dids.change(s, Did.parse(did), wire.DidChange(open=is_open))

    # --- rules --------------------------------------------------------------------------------------------------------

    @act(
        7,
        did=collections | small,
        copies=st.integers(1, 3),
        expression=st.sampled_from(list(EXPRESSIONS)),
        grouping=st.sampled_from(["dataset", "dataset", "all", "none"]),
        spread=st.sampled_from(["endpoint", "site"]),
        lifetime=st.sampled_from([*[None] * 5, 7_200, 90_000]),
        account=st.sampled_from(["root", "ann"]),
    )
    def wish(
        self,
        did: str | int,
        copies: int,
        expression: str,
        grouping: str,
        spread: str,
        lifetime: int | None,
        account: str,
    ) -> None:
        if isinstance(did, int):
            if not (files := self.some_files([did])):
                return
            did = files[0]
        expires = None if lifetime is None else self.model.now + lifetime
        wished = Wish(did, account, copies, expression, grouping, spread, expires)
        same = self.model.add_rule(wished)
        new = wire.NewRule(
            did=did, expression=expression, copies=copies, grouping=grouping, spread=spread, lifetime_seconds=lifetime
        )
        with self.quotas_hold(), self.db.write() as s:
            made = rules.add(s, Actor(account, Role.ADMIN), new)
        if same is None:
            assert made.id not in self.model.rules
            self.model.rules[made.id] = wished
        else:
            assert made.id == same

    def some_rule(self, which: int) -> int | None:
        return sorted(self.model.rules)[which % len(self.model.rules)] if self.model.rules else None

    @act(2, which=small)
    def end(self, which: int) -> None:
        if (number := self.some_rule(which)) is None:
            return
        self.model.end_rule(number)
        with self.db.write() as s:
            rules.delete(s, number)

    @act(
        3,
        which=small,
        copies=st.none() | st.integers(1, 3),
        expression=st.none() | st.sampled_from(list(EXPRESSIONS)),
        grouping=st.none() | st.sampled_from(["dataset", "all", "none"]),
        spread=st.none() | st.sampled_from(["endpoint", "site"]),
    )
    def change_wish(self, which: int, **wish: Any) -> None:
        if (number := self.some_rule(which)) is None:
            return
        said = {name: value for name, value in wish.items() if value is not None}
        self.model.change_rule(number, **said)
        with self.quotas_hold(), self.db.write() as s:
            rule_updates.update(s, ROOT, number, wire.RuleChange(**said))

    @act(2, which=small, suspended=st.sampled_from([True, False, False]))
    def suspend_or_resume(self, which: int, suspended: bool) -> None:
        if (number := self.some_rule(which)) is None:
            return
        self.model.change_rule(number, suspended=suspended)
        with self.db.write() as s:
            if suspended:
                rules.suspend(s, ROOT, number, wire.Verdict())
            else:
                rules.resume(s, ROOT, number)

    @act(1, account=st.sampled_from(["root", "ann"]), expression=st.sampled_from(["*", "site=A|site=C"]), limit=small)
    def limit_account(self, account: str, expression: str, limit: int) -> None:
        self.model.quotas[account, expression] = limit * KB
        with self.db.write() as s:
            quotas.put(s, ROOT, wire.NewQuota(account=account, expression=expression, limit_bytes=limit * KB))

    @act(3, limit_files=st.sampled_from([2, 5, 1_000]))
    def evaluate(self, limit_files: int) -> None:
        with self.quotas_hold():
            self.world.evaluate(limit_files=limit_files, times=500)

    @contextmanager
    def quotas_hold(self) -> Iterator[None]:
        """What is placed within goes beyond no quota; contents that grow may have done so before."""
        before = self.model.charged(self.usage())
        yield
        for key, used in self.model.charged(self.usage()).items():
            assert used <= max(before[key], self.model.quotas[key]), f"{key} uses {used}"

    def usage(self) -> dict[tuple[str, str], tuple[int, int]]:
        t, a, e = tables.usage.c, tables.accounts.c, tables.endpoints.c
        query = sa.select(a.name, e.name.label("endpoint"), t.files, t.bytes).where(
            t.account_id == a.id, t.endpoint_id == e.id, t.files > 0
        )
        with self.db.read() as s:
            return {(row.name, row.endpoint): (row.files, row.bytes) for row in s.execute(query)}

    # --- work ---------------------------------------------------------------------------------------------------------

    @act(6, limit=st.integers(1, 6))
    def claim(self, limit: int) -> None:
        for site, held in self.orders.items():
            held += self.world.claim(site, limit).orders

    @act(
        6,
        fates=st.lists(
            st.sampled_from([*["done"] * 5, "timed_out", "no_space", "source", "source", "lie"]), min_size=2
        ),
    )
    def report(self, fates: list[str]) -> None:
        for site, held in self.orders.items():
            self.report_some(site, list(zip(held, fates, strict=False)))
            del held[: len(fates)]

    def report_some(self, site: str, fates: list[tuple[wire.Order, str]]) -> None:
        outcomes = []
        # One that was lost and claimed again is held twice: of these the worker reports the later.
        for order, fate in {order.transfer: (order, fate) for order, fate in fates}.values():
            match fate:
                case "done":
                    outcomes.append(done(order))
                case "lie":
                    outcomes.append(done(order, checksums={"adler32": "00000001"}))
                case "source" if order.sources:
                    self.model.blame((order.did, order.sources[0].endpoint))
                    outcomes.append(failed(order, "source_missing", "source"))
                case _:
                    outcomes.append(failed(order, "timed_out" if fate == "source" else fate))
        if outcomes:
            self.done["transfers"] += self.world.report(site, outcomes, policy=POLICY).accepted

    @act(2, place=places, writable=st.booleans())
    def switch_writing(self, place: str, writable: bool) -> None:
        self.model.change_place(place, writable=writable)
        self.world.change(place, writable=writable)

    @act(1, place=places, draining=st.booleans())
    def drain(self, place: str, draining: bool) -> None:
        self.model.change_place(place, draining=draining)
        with self.db.write() as s:
            endpoints.drain(s, place, wire.Drain(undo=not draining))

    # --- deletion -----------------------------------------------------------------------------------------------------

    @act(4, place=places, at_once=st.booleans())
    def clean(self, place: str, at_once: bool) -> None:
        """The deletion pass; where nothing is kept without need, all goes that may."""
        self.world.change(place, delete_at_once=at_once)
        with self.db.write() as s:
            for endpoint_id in deletions.endpoints_to_look_at(s):
                deletions.decide(s, endpoint_id)

    @act(3, which=small, place=places)
    def ask_for_deletion(self, which: int, place: str) -> None:
        """A person wants one copy gone."""
        for file in self.some_files([which]):
            wrong = list(self.model.forbidden([(file, place)], self.look()))
            with suppress(Refused, NotFound), self.db.write() as s:
                deletions.ask(s, ROOT, wire.NewDeletion(did=file, endpoint=place))
                nothing(wrong)

    @act(4, limit=st.integers(1, 4))
    def take_deletions(self, limit: int) -> None:
        for site, held in self.removals.items():
            with self.db.write() as s:
                claim = wire.DeletionClaim(worker=f"{site}/1", limit=limit)
                orders = removals.claim(s, self.world.sites[site], claim, lease_seconds=LEASE).orders
            if orders:
                wrong = self.model.forbidden([(order.did, order.endpoint) for order in orders], self.look())
                nothing(wrong)
                held += orders
                self.done["deletions"] += len(orders)

    @act(4, fates=st.lists(st.sampled_from(["removed", "removed", "failed"]), min_size=1))
    def report_deletions(self, fates: list[str]) -> None:
        for site, held in self.removals.items():
            if some := list(zip(held, fates, strict=False)):
                del held[: len(some)]
                self.report_removed(site, some)

    def report_removed(self, site: str, fates: list[tuple[wire.DeletionOrder, str]]) -> None:
        said = {"removed": {}, "failed": {"error": "timed_out", "message": "it took too long"}}
        outcomes = [
            wire.DeletionOutcome(deletion=order.deletion, epoch=order.epoch, outcome=fate, **said[fate])
            for order, fate in {order.deletion: (order, fate) for order, fate in fates}.values()
        ]
        with self.db.write() as s:
            report = wire.DeletionReport(worker=f"{site}/1", outcomes=outcomes)
            removals.report(s, self.world.sites[site], report, fraction=0.5, policy=POLICY)
        # That it might go was seen when it was taken. Who reports too late changes nothing.
        good = self.look().good
        self.model.removed((o.did, o.endpoint) for o, _ in fates if o.endpoint not in good.get(o.did, ()))

    @act(3, seconds=st.sampled_from([1, 200, 4_000, 100_000]))
    def time_passes(self, seconds: int) -> None:
        """Leases run out and lifetimes end; the passes that see to that run."""
        self.clock.turn(seconds=seconds)
        self.model.now += seconds
        self.model.expire()
        self.world.expire(POLICY)
        with self.db.write() as s:
            removals.expire_leases(s, POLICY)
        more = True
        while more:
            with self.db.write() as s:
                more = bool(rules.expire_due(s))

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """One act. Rules of their own would be left out of most stories: Hypothesis tries few of many at a time."""
        name = data.draw(st.sampled_from([name for name, (weight, _) in ACTS.items() for _ in range(weight)]), "act")
        with_what = {word: data.draw(strategy, word) for word, strategy in ACTS[name][1].items()}
        getattr(self, name)(**with_what)
        self.nothing_contradicts()

    # --- what holds at every step, and in the end --------------------------------------------------------------------

    def nothing_contradicts(self) -> None:
        found = {f.invariant: [e.message for e in f.examples] for f in fsck.check(self.db).findings if f.violations}
        assert found == {}, found
        self.world.check()

    def teardown(self) -> None:
        try:
            self.come_to_rest()
            seen = self.look()
            nothing(self.model.faults(seen))
            self.done.update(seen.states.values())
        finally:
            self._remove()

    def come_to_rest(self) -> None:
        """Nothing fails any more, and everybody does their work."""
        for _ in range(ROUNDS):
            self.time_passes(2 * 86_400)
            self.world.evaluate(times=500)
            moved = self.world.move()
            self.done["transfers"] += moved
            for place in PLACES:
                self.clean(place, at_once=True)
            self.take_deletions(1_000)
            self.report_deletions(["removed"] * 1_000)
            self.nothing_contradicts()
            if not moved and self.at_rest():
                break
        self.nothing_contradicts()

    def at_rest(self) -> bool:
        with self.db.read() as s:
            states = [r.state for r in rules.list_page(s, limit=1_000).items]
        return "replicating" not in states and "stuck" not in states

    def look(self) -> Seen:
        with self.db.read() as s:
            name = dict(
                s.execute(
                    sa.select(tables.dids.c.id, tables.scopes.c.name + ":" + tables.dids.c.name).join_from(
                        tables.dids, tables.scopes, tables.scopes.c.id == tables.dids.c.scope_id
                    )
                ).all()
            )
            place = dict(s.execute(sa.select(tables.endpoints.c.id, tables.endpoints.c.name)).all())
            shown = {r.id: r for r in rules.list_page(s, limit=1_000).items}
            locks: dict[int, dict[str, set[str]]] = {}
            held: dict[int, dict[str, set[str]]] = {}
            for row in s.execute(sa.select(tables.locks)):
                if row.rule_id in shown:
                    into = [held] if row.surplus else [held, locks]
                    for which in into:
                        of_unit = which.setdefault(row.rule_id, {}).setdefault(name[row.unit_id], set())
                        of_unit.add(place[row.endpoint_id])
            good: dict[str, set[str]] = {}
            for did in self.model.sizes:
                for r in replicas.locate(s, Did.parse(did), None, 100).items:
                    if r.state == "available":
                        good.setdefault(did, set()).add(r.endpoint)
            every = {did: dids.get(s, Did.parse(did)) for did in DATASETS + CONTAINERS}
            return Seen(
                contents={
                    did: {child.did for child in dids.contents(s, Did.parse(did), None, 1_000).items} for did in every
                },
                open={did: found.open for did, found in every.items()},
                sizes={did: (found.files or 0, found.size or 0) for did, found in every.items()},
                states={number: r.state for number, r in shown.items()},
                why={number: [reason.message for reason in r.reasons] for number, r in shown.items()},
                locks=locks,
                held=held,
                good=good,
                usage=self.usage(),
            )


def one_database(db: Database) -> Make:
    """The same for all stories, emptied after each: numbers begin anew, for what is drawn by lot depends on them."""

    def empty() -> None:
        with db.write() as s:
            if s.postgresql:
                names = ", ".join(table.name for table in tables.metadata.sorted_tables)
                s.execute(sa.text(f"TRUNCATE {names} RESTART IDENTITY"))
            else:
                for table in reversed(tables.metadata.sorted_tables):
                    s.execute(table.delete())

    return lambda: (db, empty)


def drive(make: Make, stories: int, steps: int, *, anew: bool = False) -> Counter[str]:
    """`anew`: other stories each time, and a failure is made small, which takes minutes."""
    machine = type("Catalogue", (Catalogue,), {"make": staticmethod(make), "done": Counter()})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=stories,
            stateful_step_count=steps,
            deadline=None,
            derandomize=not anew,
            database=None,
            phases=[Phase.generate, Phase.shrink] if anew else [Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    return machine.done


def test_the_catalogue_is_what_the_model_says(db: Database) -> None:
    # A statement takes PostgreSQL some times longer, and the stories are the same.
    stories = 5 if db.engine.dialect.name == "postgresql" else 12
    did = drive(one_database(db), stories, steps=30)
    # Stories in which nothing happens would show nothing.
    assert did["transfers"] >= stories, did
    assert did["ok"] >= stories // 3, did
