"""The Celery worker of a process: an ear for hints, started again when it falls silent.

Given     the broker's URL and the queues to listen to.
Returns   a thread that runs Celery's worker until stopped.
Promises  a broker that is absent, dies or was filled with nonsense costs hints and nothing else: what a poison message
          ends is started again in the same process, without that message; the log stays readable meanwhile.
Partner   workers.tasks rings the bell; whoever is woken also looks by itself.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from typing import Any

from replica.hints import connect, publish
from replica.log import Sparing, get_logger
from workers import runtime
from workers.app import make_app

#: Pauses between two lives of Celery's worker.
RESTART_SECONDS = (0.2, 1.0, 5.0, 15.0, 30.0)
#: A worker that lived so long was healthy: the pauses begin anew.
HEALTHY_SECONDS = 60.0


class Consumer(threading.Thread):
    def __init__(self, broker_url: str, queues: tuple[str, ...]) -> None:
        super().__init__(name="celery", daemon=True)
        self.broker_url = broker_url
        self.queues = queues
        #: Set while Celery's worker is connected and listens.
        self.ready = threading.Event()
        self.restarts = 0
        self._stopping = threading.Event()
        self._worker: Any = None
        self._log = get_logger(queues=list(queues))
        _quiet()

    def run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            reason = self._one_life()
            if self._stopping.is_set():
                break
            self.restarts += 1
            failures = 1 if time.monotonic() - began > HEALTHY_SECONDS else failures + 1
            pause = RESTART_SECONDS[min(failures, len(RESTART_SECONDS)) - 1]
            self._log.error("celery.ended", reason=reason, next_start_in_seconds=pause)
            # Hints are worth nothing next to the one that kills whoever reads it: empty the queues and look instead.
            self._empty_queues()
            for queue in self.queues:
                runtime.ring(queue)
            self._stopping.wait(pause)

    def _one_life(self) -> str:
        """Run Celery's worker until it ends; returns why."""
        from celery.worker import state

        state.should_stop = None
        app = make_app(self.broker_url, self.queues)
        try:
            self._worker = app.WorkController(
                hostname=f"replica-{os.getpid()}@{socket.gethostname()}",
                queues=list(self.queues),
                loglevel=logging.WARNING,
                ready_callback=self._is_ready,
                without_heartbeat=True,
                without_mingle=True,
                without_gossip=True,
            )
            self._worker.start()
        except (SystemExit, KeyboardInterrupt) as error:
            return f"{type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001  a thread that dies in silence would be an ear lost for ever
            self._log.exception("celery.failed")
            return f"{type(error).__name__}: {error}"
        finally:
            self.ready.clear()
            self._worker = None
            app.close()
        return "it stopped"

    def _is_ready(self, consumer: Any) -> None:
        self.ready.set()
        for queue in self.queues:  # one may have been added while Celery was starting
            consumer.add_task_queue(queue, exchange="", routing_key=queue)

    def add_queue(self, queue: str) -> None:
        """Listen to one more queue from now on."""
        if queue in self.queues:
            return
        self.queues = (*self.queues, queue)
        worker = self._worker
        consumer = getattr(worker, "consumer", None)
        if consumer is not None and self.ready.is_set():
            # In the consumer's own thread, when its loop comes round next.
            consumer.call_soon(consumer.add_task_queue, queue, exchange="", routing_key=queue)
            self._nudge()

    def _empty_queues(self) -> None:
        for queue in self.queues:
            try:
                with connect(self.broker_url) as connection:
                    connection.default_channel.queue_purge(queue)
            except Exception as error:  # noqa: BLE001  absent, or the key is of another type: gone all the same
                self._log.debug("celery.queue_not_emptied", queue=queue, reason=str(error))

    def stop(self, seconds: float = 5.0) -> bool:
        """End Celery's worker; True if it ended in time."""
        from celery.worker import state

        self._stopping.set()
        if self._worker is not None:
            state.should_stop = 0  # the consumer's loop raises WorkerShutdown when it comes round
            self._nudge()
        self.join(seconds)
        return not self.is_alive()

    def _nudge(self) -> None:
        """Last messages: the loop over a broker in memory comes round only after one, or after two seconds.

        Two, because it drains once more after it has seen that it shall end.
        """
        if not self.broker_url.startswith("memory"):
            return
        try:
            with connect(self.broker_url) as connection:
                for _ in range(2):
                    publish(connection.default_channel, self.queues[0])
                    time.sleep(0.02)
        except Exception as error:  # noqa: BLE001  then it takes a moment longer
            self._log.debug("celery.not_nudged", reason=str(error))


class _Sparingly(logging.Filter):
    """A broker that is away is news once a minute, not at every attempt."""

    def __init__(self) -> None:
        super().__init__()
        self._sparing = Sparing(60)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.CRITICAL:
            return True
        return self._sparing.due() is not None


class _Without(logging.Filter):
    """kombu finds it strange that a broker in memory has no host, at every connection."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "No hostname was supplied" not in record.getMessage()


def _quiet() -> None:
    for name, kind in (("celery.worker.consumer.consumer", _Sparingly), ("kombu.connection", _Without)):
        logger = logging.getLogger(name)
        if not any(isinstance(present, kind) for present in logger.filters):
            logger.addFilter(kind())
