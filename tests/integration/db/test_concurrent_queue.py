"""Many workers and users on one queue at once: threads and processes on SQLite and PostgreSQL."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
from sqlalchemy import select

from sdpipeline.db import job_control, leasing, queue, reconcile, registry, tables
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database, open_database
from sdpipeline.db.locks import lock_campaign
from sdpipeline.db.registry import Approval
from sdpipeline.domain import JobSpec
from tests.factories import (
    CHECKPOINT,
    chains,
    checkpoint_files,
    completed,
    events,
    failed,
    job_spec,
    leased,
    published,
    statuses,
    try_lease,
)
from tests.integration.databases import on_postgresql
from tests.integration.processes import processes
from tests.integration.worker.test_shutdown import wait_for


def work(audit: AuditLog, worker_id: str, *, fail_every: int = 0) -> list[int]:
    """Lease and complete until nothing is ready; return the ids of the completed jobs."""
    done: list[int] = []
    while (lease := try_lease(audit, worker_id=worker_id, limit=4)) is not None:
        for job in lease.jobs:
            if fail_every and job.id % fail_every == 0:
                failed(audit, lease, job)
        results = completed(audit, lease)
        done += [job.id for job, success in zip(lease.jobs, results, strict=True) if success]
    return done


def work_in_process(url: str, worker_id: str) -> list[int]:
    database = open_database(url)
    try:
        return work(AuditLog(database, actor=worker_id), worker_id)
    finally:
        database.close()


def diamonds(count: int) -> list[JobSpec]:
    """Two drafts per row, with two joins that depend on both."""
    jobs = []
    for number in range(count):
        drafts = tuple(job_spec(f"row-{number}", stage=f"draft-{n}") for n in range(2))
        # Each join lists its parents in a different order, so that two finishing drafts lock the joins in opposite
        # orders.
        joins = [job_spec(f"row-{number}", stage=f"join-{n}", parents=drafts[:: 1 - 2 * n]) for n in range(2)]
        jobs += [*drafts, *joins]
    return jobs


def test_eight_processes_never_finish_one_job_twice(audit: AuditLog, database: Database, database_url: str) -> None:
    published(audit, chains(60, "draft", "scene"))
    with ProcessPoolExecutor(8, mp_context=processes) as pool:
        done = [pool.submit(work_in_process, database_url, f"worker-{n}") for n in range(8)]
        finished = Counter(job_id for each in done for job_id in each.result())
    assert set(finished.values()) == {1}
    rest = work(audit, "worker-last")  # jobs that became ready just after the last worker found none
    assert len(rest) + len(finished) == 120
    assert set(statuses(database)) == {"succeeded"}


def test_parents_of_common_children_finish_at_once_without_a_deadlock(audit: AuditLog, database: Database) -> None:
    published(audit, diamonds(30))
    with ThreadPoolExecutor(6) as pool:
        logs = [AuditLog(database, actor=f"worker:{n}") for n in range(6)]
        runs = [pool.submit(work, log, f"worker-{n}", fail_every=7) for n, log in enumerate(logs)]
        done = [job_id for run in runs for job_id in run.result()]
    done += work(audit, "worker-last", fail_every=7)
    assert len(done) == len(set(done)) == statuses(database).count("succeeded")
    assert set(statuses(database)) == {"succeeded", "failed", "skipped"}


def test_people_submit_cancel_and_retry_while_workers_work(audit: AuditLog, database: Database) -> None:
    campaign_id = published(audit, diamonds(20)).campaign_id
    stop = threading.Event()

    def keep_working(n: int) -> None:
        log = AuditLog(database, actor=f"worker:{n}")
        while not stop.is_set():
            work(log, f"worker-{n}", fail_every=5)
            with log.transaction() as tx:
                queue.reap(tx)
                queue.promote(tx.connection)

    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(keep_working, n) for n in range(3)]
        try:
            for number in range(4):
                rest = [spec for spec in diamonds(20) if spec.row_key != f"row-{number}"]
                published(audit, [*rest, *chains(3, f"extra-{number}")], prune=True)
                with audit.transaction() as tx:
                    job_control.retry(tx, campaign_id=campaign_id, statuses=["failed", "cancelled"])
        finally:
            stop.set()
        for run in runs:
            run.result()
    work(audit, "worker-last")
    assert set(statuses(database)) <= {"succeeded", "failed", "skipped", "cancelled"}


Take = Callable[[AuditLog, int], object]


def _cancel(audit: AuditLog, campaign_id: int) -> None:
    with audit.transaction() as tx:
        job_control.cancel(tx, campaign_id=campaign_id)


def _change(audit: AuditLog, _campaign_id: int) -> None:
    published(audit, chains(8, guidance_scale=2.0))


def _prune(audit: AuditLog, _campaign_id: int) -> None:
    published(audit, [job_spec("other")], prune=True)


def _revoke(audit: AuditLog, _campaign_id: int) -> None:
    with audit.transaction() as tx:
        registry.revoke(tx, CHECKPOINT.digest, because="test")


def _reset(audit: AuditLog, campaign_id: int) -> None:
    with audit.transaction() as tx:
        lock_campaign(tx.connection, campaign_id)
        job_control.reset(tx.connection, tables.job.c.campaign_id == campaign_id, campaign_id=campaign_id)
        job_control.resolve_new_jobs(tx, campaign_id=campaign_id)


@on_postgresql
@pytest.mark.parametrize("take", [_cancel, _change, _prune, _revoke, _reset])
def test_jobs_taken_from_a_lease_that_commits_meanwhile_leave_no_attempt_open(
    audit: AuditLog, database: Database, take: Take
) -> None:
    campaign_id = published(audit, chains(8)).campaign_id
    with audit.transaction() as tx:
        registry.add(tx, checkpoint_files("shapes", digest=CHECKPOINT.digest), Approval(approved_by="user:test"))
    with ThreadPoolExecutor(1) as pool:
        with audit.transaction() as tx:
            lease = leasing.take_lease(tx, worker_id="worker-1", limit=8, ttl_s=60.0)
            assert lease is not None
            running = pool.submit(take, AuditLog(database, actor="user:other"), campaign_id)
            wait_for(lambda: _waiting_for_a_lock(database))
        running.result()
    with database.read() as connection:
        assert reconcile.open_attempts(connection) == []
        assert reconcile.open_leases(connection) == []
    assert "leased" not in statuses(database)


def _waiting_for_a_lock(database: Database) -> bool:
    with database.read() as connection:
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        return bool(connection.exec_driver_sql(waits).scalar_one())


@on_postgresql
@pytest.mark.parametrize("how", ["reap", "release"])
def test_a_cancel_does_not_deadlock_with_the_end_of_a_lease(audit: AuditLog, database: Database, how: str) -> None:
    campaign_id = published(audit, chains(8)).campaign_id
    lease, other = leased(audit), AuditLog(database, actor="user:other")

    def end_lease() -> None:
        with other.transaction() as tx:
            if how == "reap":
                queue.reap(tx, lease_ids=[lease.id])
            else:
                queue.release(tx, lease_id=lease.id)

    with ThreadPoolExecutor(1) as pool:
        with audit.transaction() as tx:
            lock_campaign(tx.connection, campaign_id)
            running = pool.submit(end_lease)
            wait_for(lambda: _waiting_for_a_lock(database))
            assert job_control.cancel(tx, campaign_id=campaign_id) == 8
        running.result()
    assert set(statuses(database)) == {"cancelled"}


def test_each_job_and_fingerprint_succeeds_once_in_the_audit_log(
    audit: AuditLog, database: Database, database_url: str
) -> None:
    published(audit, chains(40))
    with ProcessPoolExecutor(3, mp_context=processes) as pool:
        list(pool.map(work_in_process, [database_url] * 3, ["a", "b", "c"]))
    told = [event for event in events(database) if event["event"] == "job.succeeded"]
    assert Counter(event["subject"] for event in told) == dict.fromkeys([f"job:{n}" for n in range(1, 41)], 1)
    assert len({event["writer"] for event in told}) <= 3


def test_a_forked_child_opens_its_own_connections_and_begins_its_own_chain(audit: AuditLog, database: Database) -> None:
    published(audit, chains(4))
    writers = {event["writer"] for event in events(database)}
    child = os.fork()
    if child == 0:
        work(audit, "child")
        os._exit(0)  # no clean-up of resources that belong to the parent
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert statuses(database) == ["succeeded"] * 4
    assert len({event["writer"] for event in events(database)} - writers) == 1
    published(audit, chains(5))
    with database.read() as connection:
        assert connection.execute(select(tables.campaign_version.c.number)).scalars().all() == [1, 2]
