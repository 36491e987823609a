"""Whoever read a replica and found it wrong or missing says so; a worker of its own site is sent to look.

Given     replicas, by DID and endpoint, and what was seen of each; who says it.
Returns   how many will be looked at, and how many not, and why not.
Promises  a word is no verdict: the replica stays a source and counts as before, until a worker of its own site has read
          it where it lies. Nobody can make sites read for ever: an account has so many looks, and so many bytes, in a
          day; what is doubted already, or was read again within the hour, is passed over. The guards against too many
          bad replicas hold as for what is found unattended.
Partner   replica.client.download tells what it found; replica.catalog.integrity doubts; replica.catalog.checks looks.
"""

from __future__ import annotations

from datetime import timedelta

import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, guards, integrity, outbox
from replica.catalog.bulk import Columns, rows_of
from replica.catalog.integrity import Doubt, Pair
from replica.catalog.membership import Unguessed, dids_named, literal, of_pair
from replica.catalog.provision import PAIR
from replica.db.engine import Session
from replica.db.tables import Instant, endpoints, events, files, replicas, suspects
from rules.integrity import DOUBTED_BYTES_IN_A_DAY, DOUBTS_IN_A_DAY, DOUBTS_PAUSE_SECONDS, Why
from rules.names import Did
from rules.permissions import Actor
from rules.states import DidKind, Evidence, ReplicaState

_DAY = timedelta(days=1)
_DOUBTED = "account.doubted"


def add(s: Session, actor: Actor, said: wire.Doubts) -> wire.DoubtsTaken:
    """Have these looked at, as far as the account may have it today."""
    account_id = accounts.account_id(s, actor.account)
    guards.one_at_a_time(s, "doubts", account_id)
    by_pair = _pairs(s, said)
    sizes = _worth_a_look(s, by_pair)
    count, size_bytes = _today(s, account_id)
    doubts: list[Doubt] = []
    for pair in sorted(sizes):
        fits = size_bytes + sizes[pair] <= DOUBTED_BYTES_IN_A_DAY or not count
        if count < DOUBTS_IN_A_DAY and fits:
            doubts.append(Doubt(*pair, by_pair[pair]))
            count, size_bytes = count + 1, size_bytes + sizes[pair]
    integrity.suspect(s, doubts, why=Why.READER, account_id=account_id)
    if doubts:
        told = sum(sizes[doubt.pair] for doubt in doubts)
        outbox.record(s, _DOUBTED, account_id, account_id, replicas=len(doubts), bytes=told)
    too_many = len(sizes) - len(doubts)
    return wire.DoubtsTaken(
        to_look_at=len(doubts), passed_over=len(said.replicas) - len(doubts) - too_many, too_many=too_many
    )


def _pairs(s: Session, said: wire.Doubts) -> dict[Pair, str]:
    """File and endpoint → what was seen. What is not known, or not any more, is left out."""
    names = {one.endpoint for one in said.replicas}
    places = {
        name: id_
        for id_, name in s.execute(
            sa.select(endpoints.c.id, endpoints.c.name).where(endpoints.c.name.in_(sorted(names)))
        )
    }
    given = {one.did: Did.parse(one.did) for one in said.replicas}
    columns: Columns = {"scope": sa.String(), "name": sa.String()}
    batch = rows_of(s, "files_doubted", columns, sorted({(did.scope, did.name) for did in given.values()}))
    there, walk = dids_named(s, batch)
    query = (
        sa.select(batch.c.scope, batch.c.name, there.c.id)
        .select_from(walk)
        .where(there.c.kind == DidKind.FILE, there.c.deleted_at.is_(None))
    )
    known = {(scope, name): id_ for scope, name, id_ in s.execute(query)}
    by_pair: dict[Pair, str] = {}
    for one in said.replicas:
        did = given[one.did]
        file_id, endpoint_id = known.get((did.scope, did.name)), places.get(one.endpoint)
        if file_id is not None and endpoint_id is not None:
            by_pair.setdefault((file_id, endpoint_id), one.reason)
    return by_pair


def _worth_a_look(s: Session, by_pair: dict[Pair, str]) -> dict[Pair, int]:
    """Those that count as good, are doubted by nobody, and were not read just now; and their bytes."""
    if not by_pair:
        return {}
    batch = rows_of(s, "read_wrong", PAIR, sorted(by_pair))
    old = sa.literal(s.now - timedelta(seconds=DOUBTS_PAUSE_SECONDS), Instant())
    doubted = sa.select(1).where(
        suspects.c.file_id == replicas.c.file_id, Unguessed(suspects.c.endpoint_id == replicas.c.endpoint_id)
    )
    query = (
        sa.select(replicas.c.file_id, replicas.c.endpoint_id, files.c.size_bytes)
        .select_from(batch)
        .join(replicas, of_pair(batch))
        .join(files, files.c.did_id == replicas.c.file_id)
        .where(
            Unguessed(replicas.c.state == literal(ReplicaState.AVAILABLE)),
            # What was only written just now may well be wrong; what was read again just now is not.
            Unguessed(
                sa.or_(
                    replicas.c.evidence != literal(Evidence.SCRUBBED),
                    replicas.c.verified_at.is_(None),
                    replicas.c.verified_at <= old,
                )
            ),
            sa.not_(Unguessed(sa.exists(doubted))),
        )
    )
    return {(file_id, endpoint_id): size for file_id, endpoint_id, size in s.execute(query)}


def _today(s: Session, account_id: int) -> tuple[int, int]:
    """What the account has had looked at in the last day: by its events, of which there is one for each time."""
    query = sa.select(events.c.payload).where(
        events.c.entity == "account",
        events.c.entity_id == account_id,
        events.c.kind == _DOUBTED,
        events.c.at > sa.literal(s.now - _DAY, Instant()),
    )
    told = [payload or {} for payload in s.execute(query).scalars()]
    return sum(one.get("replicas", 0) for one in told), sum(one.get("bytes", 0) for one in told)
