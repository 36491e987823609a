"""What the Celery app promises, and that the timetable names passes that exist."""

from __future__ import annotations

import pytest

from replica.hints import TASK
from workers.app import TIMETABLE, make_app, site_queue, transport_options
from workers.runtime import Report

URLS = ("redis://127.0.0.1:1/0", "memory://")


@pytest.mark.parametrize("url", URLS)
def test_celery_is_told_nothing_that_could_cost_more_than_a_hint(url: str):
    conf = make_app(url, ("control",)).conf
    assert conf.accept_content == ["json"]
    assert (conf.task_acks_late, conf.task_reject_on_worker_lost, conf.worker_prefetch_multiplier) == (False, False, 1)
    assert (conf.task_ignore_result, conf.result_backend) == (True, None)
    assert not conf.worker_enable_remote_control
    assert not conf.worker_hijack_root_logger
    assert (conf.broker_connection_retry_on_startup, conf.broker_connection_max_retries) == (True, None)


def test_over_redis_messages_are_not_acknowledged_and_nothing_waits_for_ever():
    options = transport_options("redis://h/0")
    assert options["ack_emulation"] is False
    assert options["socket_timeout"] < 60
    assert options["health_check_interval"] < 60


def test_in_memory_a_hint_is_not_a_second_late():
    assert transport_options("memory://")["polling_interval"] <= 0.02


def test_an_app_has_the_queues_it_was_given_and_no_other():
    app = make_app("memory://", (site_queue("DESY"), site_queue("GSI")))
    assert set(app.amqp.queues) == {"site.DESY", "site.GSI"}
    with pytest.raises(KeyError):
        app.amqp.queues["made up"]


def test_there_is_one_task():
    app = make_app("memory://", ("control",))
    app.loader.import_default_modules()
    assert [name for name in app.tasks if not name.startswith("celery.")] == [TASK]


@pytest.mark.parametrize("entry", TIMETABLE, ids=lambda entry: entry.name)
def test_every_pass_of_the_timetable_runs_on_an_empty_catalogue(entry, db):
    assert entry.function()(db) == Report()
    assert entry.what
