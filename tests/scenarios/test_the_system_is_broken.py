"""Break it in the middle of replicating to two other sites, then watch it heal.

The same stories with 2,000 files and one of 4 GiB: `python -m tests.scenarios.full`.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.scenarios import story
from tests.scenarios.system import System


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with System(tmp_path_factory.mktemp("system")) as running:
        yield running


def test_a_worker_is_killed_and_another_frozen_longer_than_its_lease(system: System):
    story.replicate(system, "workers", story.COMMIT, partial(story.kill_and_freeze_workers, system))


def test_redis_is_flushed_and_restarted_empty(system: System):
    story.replicate(system, "redis", story.COMMIT, partial(story.lose_redis, system))


def test_postgresql_is_restarted_without_a_goodbye(system: System):
    story.replicate(system, "postgresql", story.COMMIT, partial(story.restart_postgresql, system))


def test_the_api_is_killed_and_restarted(system: System):
    story.replicate(system, "api", story.COMMIT, partial(story.kill_api, system))


def test_a_worker_is_killed_and_another_frozen_while_redis_was_never_there(tmp_path: Path):
    with System(tmp_path, redis=False) as system:
        story.replicate(system, "alone", story.COMMIT, partial(story.kill_and_freeze_workers, system))
