"""Tell sleeping workers that there is something to look at. A lost hint costs a delay, never work.

Given     names of queues, after a commit: `site.<NAME>` for a site's workers, any other name for unattended work.
Returns   nothing, at once: a thread of its own does the sending.
Promises  never blocks and never raises into the caller; names wait in a set, so a thousand commits make one hint; a
          queue nobody reads holds at most PILE_MAX of them; without a broker nothing is lost but speed.
Partner   workers.tasks receives them; replica.db.engine calls `wake` after each commit.

The message is Celery's (protocol 2), made by hand: the API need not import Celery to say "look". It carries no URL, no
token and no order: who reads or forges it learns and gains nothing.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from replica.log import Sparing, get_logger

if TYPE_CHECKING:
    from kombu import Connection

TASK = "replica.look"
CONTROL = "control"
#: More than a few "look" in a queue say nothing new.
PILE_MAX = 10
#: Connecting, sending: a broker that needs longer counts as absent.
TIMEOUT_SECONDS = 1.0
#: Between two attempts while the broker does not answer.
PAUSE_SECONDS = 2.0

#: Senders give up at once: the hint waits here, and a request never waits for it.
REDIS_OPTIONS: dict[str, Any] = {
    "socket_timeout": TIMEOUT_SECONDS,
    "socket_connect_timeout": TIMEOUT_SECONDS,
    "retry_on_timeout": False,
    "max_retries": 0,
}


def queue_of(name: str) -> str:
    """The queue that a name in `Session.wake` stands for."""
    return name if name.startswith("site.") else CONTROL


def publish(channel: Any, queue: str) -> None:
    """One `replica.look` as Celery's protocol 2 has it."""
    id_ = str(uuid.uuid4())
    headers: dict[str, Any] = {
        "lang": "py",
        "task": TASK,
        "id": id_,
        "root_id": id_,
        "parent_id": None,
        "group": None,
        "shadow": None,
        "eta": None,
        "expires": None,
        "retries": 0,
        "timelimit": [None, None],
        "argsrepr": "()",
        "kwargsrepr": "{}",
        "origin": f"{os.getpid()}@{socket.gethostname()}",
        "ignore_result": True,
        "stamped_headers": None,
        "stamps": {},
    }
    no_chain = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    message = channel.prepare_message(
        json.dumps([[], {}, no_chain]),
        content_type="application/json",
        content_encoding="utf-8",
        headers=headers,
        properties={"correlation_id": id_, "reply_to": "", "delivery_mode": 1},
    )
    # The nameless exchange leads straight to the queue of that name: no bindings to declare or to lose.
    channel.basic_publish(message, exchange="", routing_key=queue)


class Hints:
    """The sender of one process. Start it once, `close` it at the end."""

    def __init__(self, broker_url: str | None, *, also: Callable[[set[str]], None] | None = None) -> None:
        self.broker_url = broker_url
        #: Told the same names in this process, before anything is sent: needs no broker.
        self._also = also
        self.sent = 0
        #: Names for which a full queue said that nobody needs another hint.
        self.spared = 0
        self.errors = 0
        self._waiting: set[str] = set()
        self._condition = threading.Condition()
        self._closing = False
        self._log = get_logger()
        self._sparing = Sparing(60)
        self._failing = False
        self._connection: Connection | None = None
        self._thread: threading.Thread | None = None
        if broker_url:
            self._thread = threading.Thread(target=self._run, name="hints", daemon=True)
            self._thread.start()

    def wake(self, names: Iterable[str]) -> None:
        """Somebody should look at these. Returns at once."""
        names = set(names)
        if self._also is not None:
            try:
                self._also(names)
            except Exception:  # noqa: BLE001  called right after a commit, which must not look failed
                self._log.exception("hint.failed", names=sorted(names))
        if self._thread is None or not names:
            return
        with self._condition:
            self._waiting.update(queue_of(name) for name in names)
            self._condition.notify()

    def close(self, seconds: float = 2.0) -> None:
        """Send what waits if that goes quickly, and end."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._waiting and not self._closing:
                    self._condition.wait()
                queues, self._waiting = self._waiting, set()
                closing = self._closing
            unsent = self._send(queues)
            if closing:
                self._disconnect()
                return
            if unsent:
                with self._condition:
                    self._waiting |= unsent
                    self._condition.wait_for(lambda: self._closing, PAUSE_SECONDS)

    def _send(self, queues: set[str]) -> set[str]:
        """Publish; returns the queues for which it did not succeed."""
        unsent = set(queues)
        try:
            for queue in sorted(queues):
                self._publish(queue)
                unsent.discard(queue)
        except Exception as error:  # noqa: BLE001  kombu and redis-py raise many; none may reach a request
            self.errors += 1
            self._failing = True
            self._disconnect()
            left_out = self._sparing.due()
            if left_out is not None:
                self._log.warning(
                    "hint.not_sent", reason=f"{type(error).__name__}: {error}", errors=self.errors, left_out=left_out
                )
        else:
            if self._failing:
                self._failing = False
                self._sparing.reset()
                self._log.info("hint.sent_again", errors=self.errors)
        return unsent

    def _publish(self, queue: str) -> None:
        if self._connection is None:
            self._connection = connect(self.broker_url or "")
        channel = self._connection.default_channel
        if channel.queue_declare(queue=queue).message_count >= PILE_MAX:
            self.spared += 1
            return
        publish(channel, queue)
        self.sent += 1

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.release()
            except Exception:  # noqa: BLE001  it was broken already
                self._log.debug("hint.connection_lost")


def connect(broker_url: str) -> Connection:
    """A connection to the broker whose every step ends soon; made when first used."""
    from kombu import Connection

    options = dict(REDIS_OPTIONS) if broker_url.startswith("redis") else {}
    return Connection(broker_url, connect_timeout=TIMEOUT_SECONDS, transport_options=options)


def reachable(broker_url: str) -> str | None:
    """None when the broker answers; else the reason it does not."""
    connection = None
    started = time.monotonic()
    try:
        connection = connect(broker_url)
        connection.ensure_connection(max_retries=1, timeout=TIMEOUT_SECONDS, interval_start=0, interval_step=0)
        connection.default_channel.queue_declare(queue=CONTROL)
    except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
        return f"{type(error).__name__}: {error}" if str(error) else f"no answer in {time.monotonic() - started:.1f} s"
    finally:
        if connection is not None:
            connection.release()
    return None
