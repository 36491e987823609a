"""Catalogue functions in threads: how many at once, who waits for whom, what is tried again."""

import asyncio
import threading

import pytest

from replica.api import work
from replica.api.work import Line, Work
from replica.db.engine import Database, Session
from rules.errors import Conflict, Refused, Unavailable


async def test_more_than_may_wait_are_refused_at_once_and_the_others_are_served(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(work, "WAITING_MAX", 3)
    line = Line("test", 1)
    gate = threading.Event()
    inside = [asyncio.create_task(line.run(lambda: gate.wait(30))) for _ in range(4)]
    await asyncio.sleep(0.05)
    with pytest.raises(Unavailable, match="more to do than it can"):
        await line.run(lambda: True)
    gate.set()
    assert await asyncio.gather(*inside) == [True] * 4
    assert await line.run(lambda: 5) == 5
    line.close()


async def test_who_goes_away_keeps_his_thread_until_it_is_free(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(work, "WAITING_MAX", 0)
    line = Line("test", 1)
    gate = threading.Event()
    gone = asyncio.create_task(line.run(lambda: gate.wait(30)))
    await asyncio.sleep(0.05)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    with pytest.raises(Unavailable):
        await line.run(lambda: True)
    gate.set()
    for _ in range(100):
        await asyncio.sleep(0.01)
        try:
            assert await line.run(lambda: True)
            break
        except Unavailable:
            continue
    else:
        raise AssertionError("the thread never came back")
    line.close()


async def test_orders_never_wait_behind_bulk_work(db: Database):
    working = Work(db)
    gate = threading.Event()

    def bulk(s: Session) -> None:
        gate.wait(30)

    busy = [asyncio.create_task(working.read(False, bulk)) for _ in range(3 * db.pool_size)]
    await asyncio.sleep(0.1)
    async with asyncio.timeout(5):
        assert await working.read(True, lambda s: 5) == 5
    gate.set()
    await asyncio.gather(*busy)
    working.close()


async def test_a_write_that_lost_a_race_is_done_again_and_another_refusal_is_not(sqlite: Database):
    working = Work(sqlite)
    tries: list[int] = []

    def racing(s: Session) -> str:
        tries.append(1)
        if len(tries) < 3:
            raise Conflict("two requests wanted the same rows")
        return "done"

    def refusing(s: Session) -> None:
        tries.append(1)
        raise Refused("no")

    def losing(s: Session) -> None:
        tries.append(1)
        raise Conflict("again and again")

    assert await working.write(False, None, 200, racing) == "done"
    tries.clear()
    for function, error, count in ((refusing, Refused, 1), (losing, Conflict, 3)):
        tries.clear()
        with pytest.raises(error):
            await working.write(False, None, 200, function)
        assert len(tries) == count
    working.close()


async def test_sqlite_writes_one_after_the_other(sqlite: Database):
    working = Work(sqlite)
    names = set()

    def write(s: Session) -> None:
        names.add(threading.current_thread().name)

    await asyncio.gather(*(working.write(False, None, 200, write) for _ in range(50)))
    assert len(names) == 1
    working.close()
