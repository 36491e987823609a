"""Bring what a Rucio knows into this catalogue: places, then data, then wishes.

Given     a client, and files: an `/export` document, and NDJSON dumps of DIDs, contents, replicas and rules.
Returns   what was sent for each noun, and what could not be mapped, counted by reason with examples.
Promises  may be repeated and goes on where it was: what is there already stays. Constant memory: dumps are read line by
          line, once for each noun. Nobody read the bytes: replicas are registered as *declared*, and count only when a
          worker of their site has verified them. A line that cannot be mapped costs that line only.
Partner   replica.client.rucio_documents says what means what.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import msgspec

from replica import wire
from replica.client import Client
from replica.client.rucio_documents import (
    Copy,
    Entry,
    Kind,
    Place,
    Wish,
    collection_of,
    copies_of,
    did_kind,
    did_text,
    distances_of,
    kind_of,
    path_of,
    place_of,
    rule_of,
)
from rules.errors import AlreadyExists, Invalid, NotAllowed, NotAuthenticated, NotFound, ReplicaError, Unavailable
from rules.names import Did, shown

T = TypeVar("T")
P = ParamSpec("P")

#: A file that is one document is read whole; a dump never is.
DOCUMENT_BYTES_MAX = 256 << 20
#: Replicas, or contents, that are sent together.
BATCH = 5_000
EXAMPLES = 20
#: These end the import: nothing else would fare better.
_FATAL = (Unavailable, NotAuthenticated, NotAllowed)

Tell = Callable[[str, int], None]


@dataclass(slots=True)
class Unmapped:
    """What could not be brought over, for one reason."""

    noun: str
    reason: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Imported:
    """How many of each noun were sent and taken; they are there now, whether or not they were before."""

    taken: dict[str, int] = field(default_factory=dict)
    unmapped: list[Unmapped] = field(default_factory=list)


class RucioImport:
    """`run` once. With `plan`, nothing is sent: what is read and mapped is counted all the same."""

    def __init__(
        self, client: Client, *, urls: dict[str, str] | None = None, plan: bool = False, tell: Tell | None = None
    ) -> None:
        self._client = client
        self._urls = urls or {}
        self._plan = plan
        self._tell = tell or (lambda noun, count: None)
        self._taken: Counter[str] = Counter()
        self._unmapped: dict[tuple[str, str], Unmapped] = {}
        self._places: dict[str, Place] = {}
        self._scopes: set[str] = set()
        self._now = datetime.now(UTC)
        #: Lines that say nothing are told once, in the first of the readings.
        self._read_once = False

    def run(self, files: Sequence[Path]) -> Imported:
        documents = {path: document for path in files if (document := _document(path)) is not None}
        dumps = [path for path in files if path not in documents]
        for document in documents.values():
            self._places_of(document)
        self._known_places()
        self._collections(dumps)
        self._read_once = True
        self._replicas(dumps)
        self._contents(dumps)
        self._rules(dumps)
        return Imported(dict(self._taken), list(self._unmapped.values()))

    # --- places -----------------------------------------------------------------------------------------------------

    def _places_of(self, document: Entry) -> None:
        for entry in document.get("accounts") or ():
            self._each("account", str(entry.get("account")), self._account, entry)
        for key, rse in (document.get("rses") or {}).items():
            name = str(rse.get("rse") or rse.get("name") or key)
            self._each("endpoint", name, self._place, name, rse)
        for source, target, distance in distances_of(document.get("distances") or {}):
            self._each("link", f"{source} → {target}", self._link, source, target, distance)
        for noun in sorted(set(document) - {"rses", "distances", "accounts"}):
            self._remark("document", noun, "nothing here corresponds to it")

    def _account(self, entry: Entry) -> None:
        name = str(entry["account"])
        self._send(self._client.accounts.add, wire.NewAccount(name=name))
        if entry.get("identities") or entry.get("email"):
            self._remark("account", name, "identities and addresses are not taken over: give it a key")

    def _place(self, name: str, rse: Entry) -> None:
        place = place_of(name, rse, self._urls.get(name))
        self._send(self._client.sites.add, place.endpoint.site)
        self._send(self._client.endpoints.add, place.endpoint)
        if place.change != wire.EndpointChange():
            self._send(self._client.endpoints.change, name, place.change)
        self._places[name] = place
        for remark in place.remarks:
            self._remark("endpoint", name, remark)

    def _link(self, source: str, target: str, distance: int) -> None:
        missing = {source, target} - self._places.keys()
        if missing:
            raise Invalid(f"there is no endpoint {', '.join(sorted(missing))}")
        self._send(self._client.endpoints.set_link, wire.LinkChange(source=source, target=target, distance=distance))

    def _known_places(self) -> None:
        """Endpoints that were brought over before, or made by hand: dumps may come without the export document."""
        if self._plan:
            return
        for endpoint in self._client.endpoints.list():
            if endpoint.name not in self._places:
                new = wire.NewEndpoint(name=endpoint.name, site=endpoint.site, url=endpoint.url)
                self._places[endpoint.name] = Place(new, wire.EndpointChange(), True, ())

    # --- data -------------------------------------------------------------------------------------------------------

    def _collections(self, dumps: Iterable[Path]) -> None:
        for entry in self._lines(dumps, "did"):
            # A file comes with its replicas; one without any holds no data.
            if self._read("did", did_kind, entry) in ("dataset", "container"):
                self._each("did", _label(entry), self._collection, entry)

    def _collection(self, entry: Entry) -> None:
        found = collection_of(entry, self._now)
        self._scope_of(found.new.did)
        self._send(self._client.dids.add, found.new)

    def _replicas(self, dumps: Iterable[Path]) -> None:
        waiting: dict[str, list[wire.NewReplica]] = {}
        for entry in self._lines(dumps, "replica"):
            for copy, replica in self._read("replica", self._copies, entry) or ():
                batch = waiting.setdefault(copy.rse, [])
                batch.append(replica)
                if len(batch) >= BATCH:
                    self._register(copy.rse, waiting.pop(copy.rse))
        for rse, batch in waiting.items():
            self._register(rse, batch)

    def _copies(self, entry: Entry) -> list[tuple[Copy, wire.NewReplica]]:
        found = [(copy, self._read("replica", self._replica, copy)) for copy in copies_of(entry)]
        return [(copy, replica) for copy, replica in found if replica is not None]

    def _replica(self, copy: Copy) -> wire.NewReplica:
        place = self._places.get(copy.rse)
        if place is None:
            raise Invalid(f"there is no endpoint {shown(copy.rse)}", hint="bring over the /export document first")
        if copy.state != "AVAILABLE":
            raise Invalid(f"its state at {copy.rse} is {copy.state}: only what is available is brought over")
        Did.parse(copy.did)
        return wire.NewReplica(did=copy.did, size=copy.size, checksums=copy.checksums, path=path_of(copy, place))

    def _register(self, rse: str, batch: list[wire.NewReplica]) -> None:
        """All of them, or, when some are refused, those that are not."""
        for replica in batch:
            self._scope_of(replica.did)
        registration = wire.Registration(endpoint=rse, replicas=batch, evidence="declared")
        try:
            self._send(self._client.replicas.register, registration)
        except _FATAL:
            raise
        except ReplicaError as error:
            if len(batch) == 1:
                self._remark("replica", f"{batch[0].did} at {rse}", error.message)
            for half in _halves(batch):
                self._register(rse, half)
        else:
            self._count("replica", len(batch))

    def _contents(self, dumps: Sequence[Path]) -> None:
        """Children of one parent that follow one another go together; what is closed is closed when all are in."""
        named = (pair for e in self._lines(dumps, "content") if (pair := self._read("content", parent_and_child, e)))
        for parent, children in _runs(named):
            self._attach(parent, children)
        for entry in self._lines(dumps, "did"):
            found = self._read("closed", collection_of, entry, self._now) if _is_collection(entry) else None
            if found is not None and found.closed:
                self._each("closed", found.new.did, self._close, found.new.did)

    def _attach(self, parent: str, children: list[str]) -> None:
        try:
            self._send(self._client.dids.attach, parent, children)
        except _FATAL:
            raise
        except ReplicaError as error:
            if self._is_closed(parent) and (inside := self._inside(parent)):
                # Closed by an earlier run: what that one put in is there.
                self._count("content", len(inside.intersection(children)))
                for child in sorted(set(children) - inside):
                    self._remark("content", f"{child} in {parent}", error.message)
            elif len(children) == 1:
                self._remark("content", f"{children[0]} in {parent}", error.message)
            else:
                for half in _halves(children):
                    self._attach(parent, half)
        else:
            self._count("content", len(children))

    def _is_closed(self, parent: str) -> bool:
        try:
            return not self._client.dids.show(parent).open
        except NotFound:
            return False

    def _inside(self, parent: str) -> set[str]:
        return {child.did for child in self._client.dids.contents(parent)}

    def _close(self, did: str) -> None:
        self._send(self._client.dids.change, did, wire.DidChange(open=False))

    def _scope_of(self, did: str) -> None:
        scope = Did.parse(did).scope
        if scope not in self._scopes:
            self._send(self._client.scopes.add, scope)
            self._scopes.add(scope)
            self._count("scope")

    # --- wishes -----------------------------------------------------------------------------------------------------

    def _rules(self, dumps: Iterable[Path]) -> None:
        for entry in self._lines(dumps, "rule"):
            self._each("rule", f"{_label(entry)} → {entry['rse_expression']}", self._rule, entry)

    def _rule(self, entry: Entry) -> None:
        wish = rule_of(entry, self._now)
        made = self._send(self._wish, wish)
        if made is not None and wish.suspended and made.state != "suspended":
            self._client.rules.suspend(made.id)
        for remark in wish.remarks:
            self._remark("rule", wish.new.did, remark)

    def _wish(self, wish: Wish) -> wire.Rule:
        """The rule that was brought over before, told by its id in Rucio, or a new one of the same account."""
        known = (wish.new.metadata or {}).get("rucio_id")
        for rule in self._client.rules.list(did=wish.new.did):
            if known is not None and (rule.metadata or {}).get("rucio_id") == known:
                return rule
        made = self._client.rules.add(wish.new)
        if wish.account is not None and wish.account != made.account:
            made = self._client.rules.update(made.id, wire.RuleChange(account=wish.account))
        return made

    # --- reading, sending, counting ---------------------------------------------------------------------------------

    def _lines(self, dumps: Iterable[Path], wanted: Kind) -> Iterator[Entry]:
        for path in dumps:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    try:
                        entry = msgspec.json.decode(line)
                        if not isinstance(entry, dict):
                            raise Invalid("this is no object", hint="one JSON object a line")
                        kind = kind_of(entry)
                    except (msgspec.DecodeError, Invalid) as error:
                        if not self._read_once:
                            self._remark("line", f"{path.name}:{number}", str(error))
                        continue
                    if kind == wanted:
                        yield entry

    def _each(self, noun: str, name: str, do: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """One thing; what is refused is remembered and costs only itself."""
        try:
            do(*args, **kwargs)
        except _FATAL:
            raise
        except ReplicaError as error:
            self._remark(noun, name, error.message)
        except (KeyError, TypeError, ValueError) as error:
            self._remark(noun, name, f"it cannot be read: {error!r}")
        else:
            self._count(noun)

    def _read(self, noun: str, read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return read(*args, **kwargs)
        except Invalid as error:
            self._remark(noun, error.message, error.hint or "it cannot be brought over")
        except (KeyError, TypeError, ValueError) as error:
            self._remark(noun, repr(error), "it cannot be read")
        return None

    def _send(self, send: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """None when it is there already, or when nothing is to be sent."""
        if self._plan:
            return None
        try:
            return send(*args, **kwargs)
        except AlreadyExists:
            return None

    def _count(self, noun: str, count: int = 1) -> None:
        self._taken[noun] += count
        self._tell(noun, self._taken[noun])

    def _remark(self, noun: str, name: str, reason: str) -> None:
        found = self._unmapped.setdefault((noun, reason), Unmapped(noun, reason))
        found.count += 1
        if len(found.examples) < EXAMPLES:
            found.examples.append(name[:200])


def _document(path: Path) -> Entry | None:
    """The export document in a file, or None: then it is a dump."""
    with path.open("rb") as file:
        first = file.readline()
        try:
            entry: Any = msgspec.json.decode(first)
        except msgspec.DecodeError:
            if path.stat().st_size > DOCUMENT_BYTES_MAX:
                raise Invalid(
                    f"{path} is neither NDJSON nor a document of a sensible size", hint="one JSON object a line"
                ) from None
            try:
                entry = msgspec.json.decode(first + file.read())
            except msgspec.DecodeError as error:
                raise Invalid(f"{path} is not JSON: {error}", hint="save what GET /export answers") from None
    if isinstance(entry, dict) and entry.keys() & {"rses", "distances", "accounts"} and "scope" not in entry:
        return entry
    return None


def _label(entry: Entry) -> str:
    return f"{entry.get('scope')}:{entry.get('name')}"


def _is_collection(entry: Entry) -> bool:
    return str(entry.get("type") or entry.get("did_type")).upper()[:1] in ("D", "C")


def parent_and_child(entry: Entry) -> tuple[str, str]:
    return did_text(entry), did_text(entry, "child_scope", "child_name")


def _halves(items: list[T]) -> list[list[T]]:
    """What was refused as a whole is sent in two parts; of one item there are none."""
    middle = len(items) // 2
    return [items[:middle], items[middle:]] if middle else []


def _runs(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """`(parent, children)`, as many children as follow one another and fit into a call."""
    parent, children = "", list[str]()
    for over, child in pairs:
        if children and (over != parent or len(children) >= BATCH):
            yield parent, children
            children = []
        parent = over
        children.append(child)
    if children:
        yield parent, children


__all__ = ["Imported", "RucioImport", "Unmapped"]
