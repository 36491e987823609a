"""What users may rely on, in sets and dicts: the catalogue without its database, its queues and its counters.

Given     the same acts as the real catalogue, by the same names.
Returns   which of them must be refused; and, when nothing is under way any more, what must be true.
Promises  places nothing by itself: of where copies are it takes what it is shown, and says whether that is allowed.
Partner   test_the_model.py drives both and compares.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

Copy = tuple[str, str]  #: a file and the endpoint where it is


@dataclass(frozen=True)
class Place:
    """An endpoint."""

    name: str
    site: str
    writable: bool = True
    draining: bool = False

    @property
    def takes(self) -> bool:
        return self.writable and not self.draining


#: The expressions that are used, and what they mean.
EXPRESSIONS: Mapping[str, Callable[[Place], bool]] = {
    "*": lambda p: True,
    "A-1": lambda p: p.name == "A-1",
    "A-1|B-1": lambda p: p.name in ("A-1", "B-1"),
    "site=A|site=C": lambda p: p.site in ("A", "C"),
    r"*\C-1": lambda p: p.name != "C-1",
}


@dataclass(frozen=True)
class Wish:
    """A rule."""

    did: str
    account: str
    copies: int
    expression: str
    grouping: str
    spread: str
    expires: float | None = None
    suspended: bool = False

    def allows(self, place: Place) -> bool:
        return EXPRESSIONS[self.expression](place)

    def domain(self, place: Place) -> str:
        return place.site if self.spread == "site" else place.name


class Refusal(Exception):
    """The catalogue must refuse this, too."""


@dataclass
class Model:
    places: dict[str, Place]
    now: float = 0.0
    sizes: dict[str, int] = field(default_factory=dict)
    #: Datasets and containers, and what is directly in them.
    datasets: dict[str, set[str]] = field(default_factory=dict)
    containers: dict[str, set[str]] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    rules: dict[int, Wish] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    #: Copies that somebody registered, and that nobody found fault with.
    registered: set[Copy] = field(default_factory=set)
    #: Copies that a worker said it could not read, since they were registered; and files of which that was ever said.
    blamed: set[Copy] = field(default_factory=set)
    doubtful: set[str] = field(default_factory=set)
    #: Account and expression → bytes.
    quotas: dict[tuple[str, str], int] = field(default_factory=dict)

    # --- acts --------------------------------------------------------------------------------------------------------

    def register(self, files: Collection[str], size: Callable[[str], int], place: str, dataset: str | None) -> None:
        if dataset is not None and dataset in self.closed:
            raise Refusal(f"{dataset} is closed")
        for file in files:
            self.sizes[file] = size(file)
            self.registered.add((file, place))
            self.blamed.discard((file, place))
        if dataset is not None:
            self.datasets[dataset] |= set(files)

    def attach(self, parent: str, children: Collection[str]) -> None:
        self._must_be_open(parent)
        if parent in self.datasets:
            if any(child not in self.sizes for child in children):
                raise Refusal("datasets hold files")
            self.datasets[parent] |= set(children)
        else:
            if any(child in self.sizes for child in children):
                raise Refusal("containers hold no files")
            if any(parent in self.everything_in(child) for child in children):
                raise Refusal("it would contain itself")
            self.containers[parent] |= set(children)

    def detach(self, parent: str, children: Collection[str]) -> None:
        self._must_be_open(parent)
        self._holding(parent).difference_update(children)

    def blame(self, copy: Copy) -> None:
        self.blamed.add(copy)
        self.doubtful.add(copy[0])

    def removed(self, copies: Iterable[Copy]) -> None:
        self.registered.difference_update(copies)

    def close(self, did: str) -> None:
        self.closed.add(did)

    def reopen(self, did: str) -> None:
        self.closed.discard(did)

    def add_rule(self, wish: Wish) -> int | None:
        """The number of the rule that wishes the same already, if there is one."""
        for number, rule in self.rules.items():
            if replace(rule, suspended=False, expires=None) == replace(wish, suspended=False, expires=None) and (
                (rule.expires is None) == (wish.expires is None)
            ):
                if wish.expires is not None and rule.expires is not None:
                    self.rules[number] = replace(rule, expires=max(rule.expires, wish.expires))
                return number
        return None

    def change_rule(self, number: int, **wish: object) -> None:
        self.rules[number] = replace(self.rules[number], **wish)  # type: ignore[arg-type]

    def end_rule(self, number: int) -> None:
        del self.rules[number]
        self.ended.add(number)

    def expire(self) -> None:
        for number in [n for n, rule in self.rules.items() if rule.expires is not None and rule.expires <= self.now]:
            self.end_rule(number)

    def change_place(self, name: str, **values: bool) -> None:
        self.places[name] = replace(self.places[name], **values)

    def _must_be_open(self, parent: str) -> None:
        if parent in self.closed:
            raise Refusal(f"{parent} is closed")

    # --- what holds what ---------------------------------------------------------------------------------------------

    def _holding(self, did: str) -> set[str]:
        return self.datasets[did] if did in self.datasets else self.containers[did]

    def everything_in(self, did: str) -> set[str]:
        """The DID itself and every collection below it."""
        below = {did}
        for child in self.containers.get(did, ()):
            below |= self.everything_in(child)
        return below

    def files_in(self, did: str) -> set[str]:
        if did in self.sizes:
            return {did}
        return set().union(*(self.datasets.get(d, ()) for d in self.everything_in(did)))

    def units(self, rule: Wish) -> set[str]:
        """What the rule places as a whole."""
        if rule.grouping == "none" or rule.did in self.sizes:
            return self.files_in(rule.did)
        return {d for d in self.everything_in(rule.did) if d in self.datasets}

    # --- what must be true when nothing is under way -----------------------------------------------------------------

    def satisfiable(self, rule: Wish) -> bool:
        """Whether it must become OK: enough failure domains take copies, wherever anything is now."""
        if any(account == rule.account for account, _ in self.quotas):
            return False  # whether it has room depends on what was placed before
        places = [p for p in self.places.values() if rule.allows(p) and p.takes]
        return len({rule.domain(p) for p in places}) >= rule.copies or not self.units(rule)

    def hopeless(self, rule: Wish) -> bool:
        """Whether it cannot be OK: there are too few failure domains, whatever is there already."""
        places = [p for p in self.places.values() if rule.allows(p)]
        return len({rule.domain(p) for p in places}) < rule.copies and bool(self.units(rule))

    def faults(self, seen: Seen) -> Iterable[str]:
        """Everything in what is seen that must not be so."""
        yield from self._wrong_contents(seen)
        yield from self._wrong_rules(seen)
        yield from self._lost_files(seen)
        yield from self._wrong_usage(seen)

    def _wrong_contents(self, seen: Seen) -> Iterable[str]:
        for did, held in (self.datasets | self.containers).items():
            if seen.contents[did] != held:
                yield f"{did} holds {sorted(seen.contents[did])}, it should be {sorted(held)}"
            if seen.open[did] is (did in self.closed):
                yield f"{did} is open: {seen.open[did]}"
            files = self.files_in(did)
            true = (len(files), sum(self.sizes[f] for f in files))
            if seen.sizes[did] != true:
                yield f"{did} has {seen.sizes[did]} files and bytes, it should be {true}"

    def _wrong_rules(self, seen: Seen) -> Iterable[str]:
        if seen.states.keys() != self.rules.keys():
            yield f"in force are the rules {sorted(seen.states)}, it should be {sorted(self.rules)}"
            return
        for number, rule in self.rules.items():
            yield from self._wrong_rule(seen, f"rule {number} ({rule})", rule, seen.locks.get(number, {}), number)

    def _wrong_rule(
        self, seen: Seen, told: str, rule: Wish, locks: Mapping[str, set[str]], number: int
    ) -> Iterable[str]:
        units = self.units(rule)
        state = seen.states[number]
        if not locks.keys() <= units:
            yield f"{told} locks {locks.keys() - units}, which are no units of it"
        for unit, places in locks.items():
            domains = [rule.domain(self.places[p]) for p in places]
            if len(domains) > rule.copies or len(domains) > len(set(domains)):
                yield f"{told} locks {unit} at {sorted(places)}"
            if not all(rule.allows(self.places[p]) for p in places):
                yield f"{told} locks {unit} at {sorted(places)}, not all of which it allows"
        if rule.suspended:
            if state != "suspended":
                yield f"{told} is {state}, and a person suspended it"
            return
        readable = all(seen.good.get(f) for unit in units for f in self.files_in(unit))
        if state not in ("ok", "stuck", "replicating") or (state == "ok" and self.hopeless(rule)):
            yield f"{told} is {state}"
        if state != "ok" and self.satisfiable(rule) and readable:
            yield f"{told} is {state}, though it could be OK: {seen.why.get(number)}"
        if state == "stuck" and not seen.why.get(number):
            yield f"{told} is stuck and gives no reason"
        if state == "ok":
            if rule.grouping == "all" and len({frozenset(p) for p in locks.values()}) > 1:
                yield f"{told} is not all on one set of endpoints: {locks}"
            for unit in units:
                places = locks.get(unit, set())
                if len(places) != rule.copies:
                    yield f"{told} is OK and locks {unit} at {sorted(places)}"
                for file in self.files_in(unit):
                    if not places <= seen.good.get(file, set()):
                        yield f"{told} is OK, {file} is not at {sorted(places - seen.good.get(file, set()))}"

    def _lost_files(self, seen: Seen) -> Iterable[str]:
        for file in self.sizes.keys() - self.doubtful:
            if not seen.good.get(file):
                yield f"{file} is lost, though nobody found fault with any of its copies"
        for file, place in (self.protected(seen) & self.registered) - self.blamed:
            if place not in seen.good.get(file, ()):
                yield f"{file} at {place} was protected, and is gone"

    def forbidden(self, deleted: Iterable[Copy], seen: Seen) -> Iterable[str]:
        """What of this must not be deleted now."""
        protected = self.protected(seen)
        for file, place in deleted:
            if (file, place) in protected:
                yield f"{file} at {place} is protected"
            if file not in self.doubtful and not seen.good.get(file, set()) - {place}:
                yield f"{file} has no other good copy than that at {place}"

    def _wrong_usage(self, seen: Seen) -> Iterable[str]:
        true: dict[tuple[str, str], set[str]] = defaultdict(set)
        for number, rule in self.rules.items():
            for unit, places in seen.held.get(number, {}).items():
                for place in places:
                    true[rule.account, place] |= self.files_in(unit)
        expected = {key: (len(files), sum(self.sizes[f] for f in files)) for key, files in true.items() if files}
        if seen.usage != expected:
            yield f"usage is {seen.usage}, it should be {expected}"

    def charged(self, usage: Mapping[tuple[str, str], tuple[int, int]]) -> dict[tuple[str, str], int]:
        """Quota → the bytes that count against it."""
        return {
            (account, expression): sum(
                size
                for (who, place), (_, size) in usage.items()
                if who == account and EXPRESSIONS[expression](self.places[place])
            )
            for account, expression in self.quotas
        }

    def protected(self, seen: Seen) -> set[Copy]:
        """What no deletion may take."""
        return {
            (file, place)
            for number in self.rules
            for unit, places in seen.held.get(number, {}).items()
            for place in places
            for file in self.files_in(unit)
        }


@dataclass(frozen=True)
class Seen:
    """What the catalogue says."""

    contents: Mapping[str, set[str]]
    open: Mapping[str, bool]
    sizes: Mapping[str, tuple[int, int]]
    #: Rule → its state, and why it is not OK.
    states: Mapping[int, str]
    why: Mapping[int, list[str]]
    #: Rule → unit → endpoints, as wished; and with what is only kept for a time.
    locks: Mapping[int, Mapping[str, set[str]]]
    held: Mapping[int, Mapping[str, set[str]]]
    #: File → endpoints where it is available.
    good: Mapping[str, set[str]]
    #: Account and endpoint → files and bytes.
    usage: Mapping[tuple[str, str], tuple[int, int]]
