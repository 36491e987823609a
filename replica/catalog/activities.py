"""Activities: what transfers are for, and which part of a site's workers each of them gets.

Given     an activity and its weight; a site and the activities that wait there.
Returns   the weights; for a claim, what each activity is owed.
Promises  what was handed out is remembered in the transaction that handed it out; where only one activity waits,
          nothing is asked and nothing kept.
Partner   rules.shares decides; replica.catalog.orders asks, one claim of a site after the other.
"""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa

from replica import wire
from replica.catalog.bulk import Columns, insert, rows_of
from replica.db.engine import Session
from replica.db.tables import activities
from replica.db.tables import shares as shares_table
from rules.names import check_word
from rules.shares import Shares


def shares(s: Session, site_id: int, waiting: Collection[str]) -> Shares:
    if len(waiting) < 2:
        return Shares()
    weights = sa.select(activities.c.name, activities.c.weight, sa.null().label("deficit"))
    owed = sa.select(shares_table.c.activity, sa.null(), shares_table.c.deficit).where(
        shares_table.c.site_id == site_id
    )
    rows = s.execute(sa.union_all(weights, owed)).all()
    return Shares(
        {row.name: row.weight for row in rows if row.weight is not None},
        {row.name: row.deficit for row in rows if row.deficit is not None},
    )


def keep(s: Session, site_id: int, shares: Shares) -> None:
    if not shares.deficits:
        return
    columns: Columns = {"activity": sa.String(), "deficit": sa.Float()}
    batch = rows_of(s, "deficits", columns, sorted((name, float(owed)) for name, owed in shares.deficits.items()))
    rows = sa.select(sa.literal(site_id, sa.BigInteger()), batch.c.activity, batch.c.deficit).where(sa.true())
    upsert = insert(s, shares_table).from_select(["site_id", "activity", "deficit"], rows)
    changed = {"deficit": upsert.excluded.deficit}
    s.execute(upsert.on_conflict_do_update(index_elements=["site_id", "activity"], set_=changed))


def set_weight(s: Session, new: wire.NewActivity) -> wire.Activity:
    name = check_word(new.name, "an activity")
    upsert = insert(s, activities).values(name=name, weight=new.weight)
    s.execute(upsert.on_conflict_do_update(index_elements=["name"], set_={"weight": new.weight}))
    return wire.Activity(name=name, weight=new.weight)


def list_all(s: Session) -> wire.Activities:
    """Those whose weight was set; every other has rules.shares.DEFAULT_WEIGHT."""
    rows = s.execute(sa.select(activities).order_by(activities.c.name))
    return wire.Activities(items=[wire.Activity(name=row.name, weight=row.weight) for row in rows])
