"""The Celery app, its queues and settings, and the timetable of all unattended work, on one page.

Given     the broker's URL, or none.
Returns   a Celery app whose messages only say "look"; the timetable as data.
Promises  nothing but speed depends on the broker: every loop here also looks by itself. Celery runs no copy and no
          pass: its one task rings a bell, so a message that is lost, doubled, late or forged does no harm.
Partner   replica.hints sends; workers.tasks receives; workers.runtime runs the loops; workers.service starts them.

Queues: `site.<NAME>` for the workers of a site, `control` for unattended work.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from celery import Celery
from kombu import Exchange, Queue

from replica.hints import CONTROL


@dataclass(frozen=True, slots=True)
class Entry:
    """One pass: how often it looks by itself when the pace (`control_interval_seconds`) is the usual one."""

    name: str
    #: `module:function`, imported when it runs: a site's worker needs no database driver.
    run: str
    seconds: float
    #: The hint that brings it forward; None: nothing does, the interval is soon enough.
    woken_by: str | None
    what: str
    #: Settings that it is given by their names.
    settings: tuple[str, ...] = ()

    def function(self) -> Any:
        module, _, name = self.run.partition(":")
        return getattr(import_module(module), name)


#: The pace for which the seconds below are written.
USUAL_PACE_SECONDS = 5.0

#: Everything that happens when nobody is asking. Intervals are drawn anew, ±20 %, so that processes do not keep step.
TIMETABLE = (
    Entry("evaluation", "workers.evaluation:evaluate", 5, CONTROL, "rules that are due: place copies, order transfers"),
    Entry("routes", "workers.routes:look", 5, CONTROL, "what may not go directly: find a way over other endpoints"),
    Entry("leases", "workers.leases:release", 5, None, "orders whose worker fell silent: back to the queue"),
    Entry("deletion", "workers.deletion:delete", 20, None, "copies nobody protects: decide which go, by need of space"),
    Entry("removals", "workers.deletion:release", 10, None, "deletions whose worker fell silent: back to the queue"),
    Entry(
        "scans",
        "workers.reconciliation:schedule",
        60,
        None,
        "endpoints that were not scanned for long: scan them",
        ("scan_grace_seconds", "scan_dark_grace_seconds", "scan_fraction_max", "scan_every_days"),
    ),
    Entry(
        "lost_scans", "workers.reconciliation:release", 10, None, "scans whose worker fell silent: back to the queue"
    ),
    Entry("subscriptions", "workers.subscriptions:apply", 5, CONTROL, "data that is new or changed: make its rules"),
    Entry("events", "workers.events:deliver", 5, CONTROL, "what happened: tell webhooks"),
    Entry(
        "old_events",
        "workers.events:forget",
        3600,
        None,
        "events that are old: forget them",
        ("keep_transfer_events_days", "keep_events_days"),
    ),
    Entry(
        "concurrency",
        "workers.concurrency:adapt",
        15,
        None,
        "links and endpoints that are busy: adapt how much may be in flight",
        ("adaptive_concurrency",),
    ),
    Entry("usage", "workers.usage:note", 3600, None, "what accounts hold: written down, to be told over time"),
    Entry("expiry", "workers.expiry:expire", 10, None, "rules whose lifetime is over: they protect nothing any more"),
    Entry(
        "did_expiry",
        "workers.expiry:expire_dids",
        10,
        None,
        "DIDs whose lifetime is over are deleted; those deleted long ago are gone for good",
        ("undelete_seconds",),
    ),
    Entry(
        "forgetting", "workers.expiry:forget", 3600, None, "answers kept for repeated requests: those of last week go"
    ),
)


def site_queue(site: str) -> str:
    return f"site.{site}"


def make_app(broker_url: str, queues: tuple[str, ...]) -> Celery:
    """An app of its own for one consumer: two on one app would mix up their queues."""
    app = Celery("replica", broker=broker_url, set_as_current=False)
    app.conf.update(
        # --- what a message is
        task_serializer="json",
        accept_content=["json"],  # pickle would run what it is given
        task_protocol=2,
        # --- what is done with it: forgotten as soon as it is read; leases in the database guard the work
        task_acks_late=False,
        task_reject_on_worker_lost=False,
        worker_prefetch_multiplier=1,
        worker_concurrency=1,  # the task rings a bell; bytes are moved elsewhere
        worker_pool="threads",
        task_ignore_result=True,
        result_backend=None,  # it leaks connections, and there is nothing to say
        task_store_errors_even_if_ignored=False,
        # --- where it comes from
        task_queues=[
            Queue(name, Exchange(""), routing_key=name) for name in queues
        ],  # the nameless exchange: no bindings
        task_default_queue=queues[0],
        task_default_exchange="",
        task_create_missing_queues=False,
        # --- what nobody else may do to us: `shutdown` is a broadcast that any client of the broker can send
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        task_send_sent_event=False,
        event_queue_ttl=1,
        # --- a broker that is not there, or goes away
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,  # the order in which things are started does not matter
        broker_connection_max_retries=None,  # for ever
        broker_connection_timeout=2.0,
        broker_heartbeat=0,
        broker_pool_limit=1,
        broker_transport_options=transport_options(broker_url),
        broker_use_ssl={"ssl_cert_reqs": ssl.CERT_REQUIRED} if broker_url.startswith("rediss://") else False,
        worker_cancel_long_running_tasks_on_connection_loss=True,  # there are none; False is deprecated
        # --- the log is ours
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_log_color=False,
        imports=["workers.tasks"],
        enable_utc=True,
        timezone="UTC",
    )
    # In the threads of a pool Celery would otherwise publish through a default app, to amqp://localhost.
    app.set_default()
    return app


def transport_options(broker_url: str) -> dict[str, Any]:
    if broker_url.startswith("redis"):
        return {
            # With it, kombu keeps "unacked" messages and can end up never consuming again after Redis was restarted
            # (celery #10205), or deliver twice. A hint need not be acknowledged.
            "ack_emulation": False,
            "socket_connect_timeout": 2.0,
            "socket_timeout": 30.0,
            "socket_keepalive": True,
            "health_check_interval": 20,  # a partition is noticed, not waited out
        }
    if broker_url.startswith("memory"):
        return {"polling_interval": 0.005}  # kombu's default of 1 s would make every hint a second late
    return {}
