"""Migration while workers of the previous release are running: short waits, nothing lost, nothing made twice."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import func, select

from sdpipeline.app import services, workers
from sdpipeline.audit import load_key, seal, verify
from sdpipeline.db import migrate
from sdpipeline.db.connection import Database, open_database
from sdpipeline.db.tables import campaign, job
from sdpipeline.storage import LocalStore
from tests.factories import events
from tests.integration.certificates import signing_settings
from tests.integration.previous_release import PreviousRelease, previous_release

pytestmark = [pytest.mark.long, pytest.mark.timeout(0)]

BULK = int(os.environ.get("SDP_TEST_MIGRATION_JOBS", "5000"))
"""Number of jobs in the table during the migration: it was measured with `SDP_TEST_MIGRATION_JOBS=100000`."""

LONGEST_WAIT_S = 5.0
PATIENCE_S = 120.0


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'queue.db'}"
    return str(request.getfixturevalue("postgres_url"))


def test_workers_of_the_previous_release_go_on_while_the_database_is_migrated(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sqlite = url.startswith("sqlite")
    with previous_release(tmp_path, url) as previous:
        previous.submit(chains=80 if sqlite else 200, bulk=min(BULK, 1000) if sqlite else BULK)
        database = open_database(url)
        assert migrate.current(database) == "0001"
        for _ in range(1 if sqlite else 2):
            previous.start_worker()
        _wait_until(lambda: _done(database) >= 20, previous)
        with _watched(database) as waits:
            begun = time.monotonic()
            assert migrate.upgrade(database) == ("0001", migrate.newest())
            took_s = time.monotonic() - begun
        then = _done(database)
        _wait_until(lambda: _done(database) >= then + 20, previous)
        previous.stop_workers()
        longest = max(waits)
        print(f"{database.writer.dialect.name}: migrated in {took_s:.2f} s, a read waited at most {longest:.2f} s")
        assert longest < LONGEST_WAIT_S
        assert not [word for word in ("Traceback", "attempt_failed", "unavailable") if word in previous.log()]
        left = _count(database) - _done(database)
        assert left > 0, "nothing was left for a worker of this release"
        for name, value in (previous.settings | signing_settings(tmp_path)).items():
            monkeypatch.setenv(name, value)
        summary = workers.run_worker(services.load_settings(), campaign="spring", until_idle=True, device="cpu")
    assert (summary.succeeded, summary.failed) == (left, 0)
    assert _count(database) == _done(database) == (160 if sqlite else 400)
    told = Counter(event["subject"] for event in events(database) if event["event"] == "job.succeeded")
    assert set(told.values()) == {1}
    assert len(told) == _done(database)
    store, key = LocalStore(previous.home / "storage"), load_key(tmp_path / "seal.pem", create=True)
    seal(database, store, key)
    assert verify(database, store, key).faults == []
    database.close()


def _done(database: Database) -> int:
    return _count(database, status="succeeded")


def _count(database: Database, **values: str) -> int:
    """Number of jobs of the running campaign."""
    mine = [campaign.c.name == "spring", *(job.c[name] == value for name, value in values.items())]
    both = job.join(campaign, campaign.c.id == job.c.campaign_id)
    with database.read() as connection:
        return int(connection.execute(select(func.count()).select_from(both).where(*mine)).scalar_one())


def _wait_until(happened: Callable[[], bool], previous: PreviousRelease) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < ends, previous.log()
        assert all(worker.poll() is None for worker in previous.workers), previous.log()
        time.sleep(0.1)


@contextmanager
def _watched(database: Database) -> Iterator[list[float]]:
    """Measure the waits of a client that reads a job repeatedly until the block ends."""
    waits, ended = [0.0], threading.Event()

    def look() -> None:
        while not ended.wait(0.01):
            begun = time.monotonic()
            with database.read() as connection:
                connection.execute(select(job.c.status).where(job.c.id == 1)).all()
            waits.append(time.monotonic() - begun)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield waits
    finally:
        ended.set()
        watcher.join()
