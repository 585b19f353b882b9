"""Worker shutdown, hung batches and repeated failures."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from sdpipeline import shutdown
from sdpipeline.app import services
from sdpipeline.db import job_control, queries, tables, workers
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database, open_database
from sdpipeline.domain import Json
from sdpipeline.engine import Batch, GeneratedImage, GenerationFailure
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.errors import DeviceExhaustedError
from sdpipeline.storage import LocalStore
from sdpipeline.worker.circuit_breaker import CircuitBreaker
from sdpipeline.worker.watchdog import HUNG_EXIT_CODE, BatchTimings
from sdpipeline.worker.worker import Worker, WorkerLimits
from tests.factories import chains, events, published, signing_key, statuses
from tests.integration.commands import FAKE_ENGINE, document, start
from tests.integration.databases import on_sqlite
from tests.integration.processes import processes

PATIENCE_S = 60.0
FOR_EVER = 10**9


class Native(FakeEngine):
    """The fake engine with one native call per batch, which blocks signals as a busy device does."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self._rounds = rounds

    def generate(self, batch: Batch) -> Sequence[GeneratedImage | GenerationFailure]:
        hashlib.pbkdf2_hmac("sha256", b"", b"", self._rounds)
        return super().generate(batch)


class Sick(FakeEngine):
    """The fake engine on a device that is out of memory for the first ``failures`` batches."""

    def __init__(self, failures: int, before: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._failures = failures
        self._before = before

    def generate(self, batch: Batch) -> Sequence[GeneratedImage | GenerationFailure]:
        self._before()
        self.sizes.append(len(batch.requests))
        if len(self.sizes) <= self._failures:
            return [GenerationFailure(error=DeviceExhaustedError("out of memory")) for _ in batch.requests]
        return super().generate(batch)


def worker_in(
    audit: AuditLog, folder: Path, engine: FakeEngine, *, grace_s: float = PATIENCE_S, **options: Any
) -> Worker:
    with audit.transaction() as tx:
        workers.register(tx, worker_id="worker-1", host="here", pid=os.getpid(), device="cpu", description={})
    limits = WorkerLimits(max_batch=4, lease_ttl_s=60.0, max_pixels=10**7, shutdown_grace_s=grace_s)
    return Worker("worker-1", audit, LocalStore(folder / "storage"), engine, limits, signing_key(), **options)


def run_until_told(url: str, folder: Path, rounds: int, grace_s: float, timeout_s: float) -> None:
    """Run a worker process until it gets a signal; its exit code is the worker's."""
    audit = AuditLog(open_database(url), actor="worker:test")
    worker = worker_in(audit, folder, Native(rounds), grace_s=grace_s, timings=BatchTimings(timeout_s))
    with shutdown.handle_signals(signal.SIGTERM) as stop:
        worker.run(stop=stop, until_idle=False)
    sys.exit(stop.exit_code)


def started(url: str, folder: Path, *, rounds: int, grace_s: float = PATIENCE_S, timeout_s: float = 0.0) -> Any:
    process = processes.Process(target=run_until_told, args=(url, folder, rounds, grace_s, timeout_s), daemon=True)
    process.start()
    return process


def wait_for(answer: Callable[[], object]) -> None:
    ends_at = time.monotonic() + PATIENCE_S
    while not answer():
        assert time.monotonic() < ends_at
        time.sleep(0.02)


def told_to_end(process: ForkServerProcess, database: Database, *, times: int = 1) -> int | None:
    """Send SIGTERM in the middle of a batch; return the exit code."""
    wait_for(lambda: "leased" in statuses(database))
    time.sleep(0.5)
    for _ in range(times):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.1)
    process.join(PATIENCE_S)
    return process.exitcode


def open_leases(database: Database) -> int:
    with database.read() as connection:
        return len(connection.execute(select(tables.lease.c.id).where(tables.lease.c.closed_at.is_(None))).all())


def the_worker(database: Database) -> Json:
    with database.read() as connection:
        return dict(connection.execute(select(tables.worker)).mappings().one())


# Shutdown by a signal.


def test_a_worker_that_is_told_to_end_stores_what_it_began_and_gives_back_the_rest(
    audit: AuditLog, database: Database, database_url: str, tmp_path: Path
) -> None:
    published(audit, chains(16, "only"))
    process = started(database_url, tmp_path, rounds=2_000_000)
    assert told_to_end(process, database) == 143
    found = statuses(database, "status", "attempt", "alone")
    assert set(found) == {("succeeded", 1, False), ("ready", 0, False)}
    assert open_leases(database) == 0


@pytest.mark.parametrize("times", [1, 2], ids=["at its deadline", "when told again"])
def test_it_leaves_at_its_deadline_or_when_told_again_and_no_attempt_counts(
    audit: AuditLog, database: Database, database_url: str, tmp_path: Path, times: int
) -> None:
    published(audit, chains(4, "only"))
    process = started(database_url, tmp_path, rounds=FOR_EVER, grace_s=0.3 if times == 1 else PATIENCE_S)
    assert told_to_end(process, database, times=times) == 143
    assert set(statuses(database, "status", "attempt", "alone")) == {("ready", 0, False)}
    assert open_leases(database) == 0
    assert the_worker(database)["stopped_at"] is not None


def test_a_killed_worker_is_lost_and_one_that_is_told_to_end_leaves_with_the_signals_exit_code(tmp_path: Path) -> None:
    settings = {FAKE_ENGINE: "0.1", "SDP_LEASE_TTL_S": "2"}
    killed, idle = (start("worker", "--home", tmp_path, **settings) for _ in range(2))
    try:
        wait_for(lambda: len(_workers(tmp_path)) == 2)
        killed.kill()
        killed.wait()
        wait_for(lambda: [each["pid"] for each in _workers(tmp_path) if each["status"] == "lost"] == [killed.pid])
        found = {each["pid"]: each for each in document("status", "--home", tmp_path, given=settings)["workers"]}
        assert (found[killed.pid]["status"], found[idle.pid]["status"]) == ("lost", "working")
        assert found[killed.pid]["lost_since"] == found[killed.pid]["seen_at"]
        checks = {each["name"]: each for each in document("doctor", "--home", tmp_path, given=settings)["checks"]}
        assert f"1 alive, 1 lost: process {killed.pid} " in checks["workers"]["detail"]
        idle.terminate()
        assert idle.wait(PATIENCE_S) == 143
        assert [each["pid"] for each in _workers(tmp_path)] == [killed.pid]
    finally:
        idle.kill()


def _workers(home: Path) -> list[Json]:
    found = services.load_settings(home)
    if not services.database_exists(found):
        return []
    with services.open_services(found) as have, have.database.read() as connection:
        return queries.live_workers(connection, lost_after_s=2.0)


# Hung batches.


def test_a_batch_that_hangs_ends_the_process_and_its_jobs_are_tried_alone(
    audit: AuditLog, database: Database, database_url: str, tmp_path: Path
) -> None:
    published(audit, chains(8, "only"))
    process = started(database_url, tmp_path, rounds=FOR_EVER, timeout_s=0.5)
    process.join(PATIENCE_S)
    assert process.exitcode == HUNG_EXIT_CODE
    # Four jobs hung; jobs that were leased ahead of them are not affected.
    assert (
        sorted(statuses(database, "status", "attempt", "alone")) == [("ready", 0, False)] * 4 + [("ready", 0, True)] * 4
    )
    assert open_leases(database) == 0
    assert the_worker(database)["note"] == "a batch hung: it took longer than 0.5 s"


# Repeated failures.


def test_a_worker_whose_batches_all_fail_pauses_says_why_and_tries_one_job_at_a_time(
    audit: AuditLog, database: Database, tmp_path: Path
) -> None:
    published(audit, chains(16, "only"), max_attempts=9)
    seen: list[tuple[str, str | None]] = []

    def look() -> None:
        with database.read() as connection:
            seen.extend((each["status"], each["note"]) for each in queries.live_workers(connection))

    engine = Sick(4, look)
    breaker = CircuitBreaker(max_failures=2, first_pause_s=0.1)
    done = worker_in(audit, tmp_path, engine, breaker=breaker).run()
    assert (done.succeeded, breaker.is_open) == (16, False)
    assert engine.sizes[:5] == [4, 4, 1, 1, 1]
    why = "paused after {} failures in a row, the last: out of memory"
    assert seen[:4] == [("working", None)] * 2 + [("paused", why.format(2)), ("paused", why.format(3))]
    with database.read() as connection:
        assert [(each["status"], each["note"]) for each in queries.live_workers(connection)] == [("working", None)]
    # Each failed attempt was counted, but none of the jobs that were leased ahead and released.
    assert sum(statuses(database, "attempt")) == 16 + sum(engine.sizes[:4])
    assert "lease.released" in {event["event"] for event in events(database)}


@on_sqlite
def test_a_worker_whose_storage_refuses_writes_pauses_and_loses_no_picture(
    audit: AuditLog, database: Database, tmp_path: Path
) -> None:
    published(audit, chains(12, "only"))
    (tmp_path / "storage").write_text("a file where a folder should be")
    engine = Sick(0)
    worker = worker_in(audit, tmp_path, engine, breaker=CircuitBreaker(max_failures=2, first_pause_s=0.1))
    repaired = threading.Thread(target=_repair_once_paused, args=(database, tmp_path / "storage"))
    repaired.start()
    done = worker.run()
    repaired.join()
    assert done.succeeded == 12
    assert sum(engine.sizes) == 12
    assert set(statuses(database, "status", "attempt")) == {("succeeded", 1)}


def _repair_once_paused(database: Database, storage: Path) -> None:
    try:
        wait_for(lambda: the_worker(database)["paused_at"])
        assert str(storage) in the_worker(database)["note"]
    finally:
        storage.unlink()


# Paused by users.


def test_a_batch_that_was_fetched_is_not_begun_once_its_campaign_is_paused(
    audit: AuditLog, database: Database, tmp_path: Path
) -> None:
    campaign_id = published(audit, chains(12, "only")).campaign_id

    def pause() -> None:
        wait_for(lambda: statuses(database).count("leased") >= 8)
        with AuditLog(database, actor="user:test").transaction() as tx:
            job_control.set_campaign_status(tx, campaign_id=campaign_id, status="paused")

    engine = Sick(0, pause)
    done = worker_in(audit, tmp_path, engine).run()
    assert (engine.sizes, done.succeeded) == ([4], 4)
    assert sorted(statuses(database, "status", "attempt")) == [("ready", 0)] * 8 + [("succeeded", 1)] * 4
