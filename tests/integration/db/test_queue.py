"""Job transitions in the queue, on SQLite and PostgreSQL."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import func, select, update

from sdpipeline.db import job_control, leasing, queue, tables, workers
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database
from sdpipeline.domain import CheckpointRef, Status
from sdpipeline.errors import BadInputError
from sdpipeline.jobs import Lease
from tests.factories import (
    chains,
    completed,
    events,
    expired,
    failed,
    job_spec,
    leased,
    published,
    statuses,
    stored_image,
    try_lease,
)
from tests.integration.databases import on_postgresql

OTHER = CheckpointRef(alias="other", digest="0f" * 32)


def ids(lease: Lease | None) -> list[int]:
    return [job.id for job in lease.jobs] if lease else []


def count(database: Database, name: str) -> int:
    with database.read() as connection:
        return int(connection.execute(select(func.count()).select_from(tables.metadata.tables[name])).scalar_one())


# Selecting jobs to lease.


def test_jobs_are_leased_in_the_files_order_up_to_the_limit(audit: AuditLog, database: Database) -> None:
    published(audit, chains(5))
    assert ids(leased(audit, limit=3)) == [1, 2, 3]
    assert ids(leased(audit, limit=3)) == [4, 5]
    assert try_lease(audit) is None


def test_a_leased_job_says_all_a_worker_needs(audit: AuditLog, database: Database) -> None:
    published(audit, chains(1, "draft", "scene"))
    completed(audit, leased(audit))
    job = leased(audit).jobs[0]
    spec = list(chains(1, "draft", "scene"))[1]
    assert (job.request, job.fingerprint, job.identity) == (spec.request, spec.fingerprint, spec.identity)
    assert (job.team, job.campaign, job.stage, job.attempt, job.max_attempts) == ("default", "spring", "scene", 1, 3)
    assert [(parent.stage, parent.fingerprint) for parent in job.parents] == [("draft", next(chains(1)).fingerprint)]


def test_a_lower_priority_number_goes_first_whatever_its_batch(audit: AuditLog, database: Database) -> None:
    published(audit, chains(8), name="later", priority=100)
    published(audit, chains(1), name="now", priority=10)
    assert leased(audit).jobs[0].campaign == "now"


def test_a_full_batch_goes_before_a_deeper_stage_that_fills_none(audit: AuditLog, database: Database) -> None:
    published(audit, chains(10, "draft", "scene"))
    completed(audit, leased(audit, limit=4))
    assert {job.stage for job in leased(audit, limit=4).jobs} == {"scene"}
    completed(audit, leased(audit, limit=2))
    assert {job.stage for job in leased(audit, limit=4).jobs} == {"draft"}


def test_among_parts_of_a_batch_the_deeper_stage_goes_first(audit: AuditLog, database: Database) -> None:
    published(audit, chains(3, "draft", "scene"))
    completed(audit, leased(audit, limit=1))
    assert {job.stage for job in leased(audit).jobs} == {"scene"}


def test_among_equals_the_checkpoint_on_the_device_goes_first(audit: AuditLog, database: Database) -> None:
    published(audit, [*chains(2), *(job_spec(f"other-{n}", checkpoint=OTHER) for n in range(2))])
    assert leased(audit, limit=1, resident=[OTHER.digest]).checkpoint_digest == OTHER.digest
    assert leased(audit, limit=1).checkpoint_digest != OTHER.digest


def test_a_worker_that_asks_for_a_full_batch_gets_no_part_of_one(audit: AuditLog, database: Database) -> None:
    published(audit, chains(3))
    assert try_lease(audit, limit=4, full_only=True) is None
    assert ids(try_lease(audit, limit=3, full_only=True)) == [1, 2, 3]


def test_only_the_campaign_asked_for_is_leased(audit: AuditLog, database: Database) -> None:
    published(audit, chains(1), name="first")
    second = published(audit, chains(1), name="second")
    assert ids(try_lease(audit, campaign_id=second.campaign_id)) == [2]
    assert try_lease(audit, campaign_id=second.campaign_id) is None


def test_nothing_is_leased_from_a_paused_campaign_until_it_goes_on(audit: AuditLog, database: Database) -> None:
    campaign_id = published(audit, chains(1)).campaign_id
    with audit.transaction() as tx:
        job_control.set_campaign_status(tx, campaign_id=campaign_id, status="paused")
    assert try_lease(audit) is None
    with audit.transaction() as tx:
        job_control.set_campaign_status(tx, campaign_id=campaign_id, status="active")
    assert ids(try_lease(audit)) == [1]


def test_a_cursor_goes_on_where_it_was_and_looks_back_when_there_is_no_full_batch(
    audit: AuditLog, database: Database
) -> None:
    published(audit, chains(5))
    cursor = leasing.Cursor()
    returned = leased(audit, limit=2, cursor=cursor)
    with audit.transaction() as tx:
        queue.release(tx, lease_id=returned.id)
    assert ids(leased(audit, limit=2, cursor=cursor)) == [3, 4]
    cursor.scanned_at -= leasing.PARTIAL_BATCH_CURSOR_TTL_S
    cursor.scan_s = 0.0  # a scan may be slow on a busy machine
    assert ids(leased(audit, limit=2, cursor=cursor)) == [1, 2]
    assert ids(try_lease(audit, limit=2, cursor=cursor)) == [5]


def test_a_cursor_is_forgotten_in_time_whatever_it_finds(audit: AuditLog, database: Database) -> None:
    published(audit, chains(9))
    cursor = leasing.Cursor()
    returned = leased(audit, limit=2, cursor=cursor)
    with audit.transaction() as tx:
        queue.release(tx, lease_id=returned.id)
    cursor.scanned_at -= leasing.CURSOR_TTL_S
    assert ids(leased(audit, limit=2, cursor=cursor)) == [1, 2]


# Completing jobs, and fencing.


def test_a_completed_job_has_one_picture_and_its_children_become_ready(audit: AuditLog, database: Database) -> None:
    published(audit, chains(1, "draft", "scene"))
    assert completed(audit, leased(audit)) == [True]
    assert statuses(database) == ["succeeded", "ready"]
    assert count(database, "image") == 1
    with database.read() as connection:
        assert connection.execute(select(tables.lease.c.closed_at)).scalar() is not None
        assert connection.execute(select(tables.attempt.c.outcome)).scalars().all() == ["succeeded"]


def test_a_join_is_ready_when_its_last_parent_is(audit: AuditLog, database: Database) -> None:
    left, right = job_spec("a", stage="left"), job_spec("a", stage="right")
    published(audit, [left, right, job_spec("a", stage="joined", parents=(left, right))])
    completed(audit, leased(audit, limit=1))
    assert statuses(database, "status", "parents_left")[2] == ("waiting", 1)
    completed(audit, leased(audit, limit=1))
    assert statuses(database, "status", "parents_left")[2] == ("ready", 0)


def test_completing_after_the_lease_was_lost_writes_nothing(audit: AuditLog, database: Database) -> None:
    published(audit, chains(2, "draft", "scene"))
    lease = leased(audit)
    assert expired(audit, lease) == 2
    told = len(events(database))
    assert completed(audit, lease) == [False, False]
    assert statuses(database) == ["ready", "waiting"] * 2
    assert (count(database, "image"), len(events(database))) == (0, told)


def test_a_lost_lease_cannot_finish_what_another_worker_holds_now(audit: AuditLog, database: Database) -> None:
    published(audit, chains(1))
    lost = leased(audit)
    expired(audit, lost)
    now = leased(audit, worker_id="worker-2")
    assert completed(audit, lost) == [False]
    assert failed(audit, lost, lost.jobs[0]) is False
    assert completed(audit, now) == [True]
    assert statuses(database, "status", "attempt") == [("succeeded", 1)]


def test_a_job_is_completed_once(audit: AuditLog, database: Database) -> None:
    published(audit, chains(1))
    lease = leased(audit)
    assert completed(audit, lease) == [True]
    assert completed(audit, lease) == [False]
    assert [event["event"] for event in events(database)].count("job.succeeded") == 1


def test_a_lease_with_a_job_nobody_accounted_for_stays_open_until_it_expires(
    audit: AuditLog, database: Database
) -> None:
    published(audit, chains(2))
    lease = leased(audit)
    failed(audit, lease, lease.jobs[0])
    with database.write() as connection:
        leasing.close_lease(connection, lease.id)
    assert expired(audit, lease) == 1
    assert statuses(database) == ["failed", "ready"]


# Heartbeats.


def test_a_heartbeat_extends_open_leases_and_names_them(audit: AuditLog, database: Database) -> None:
    published(audit, chains(2))
    kept, lost = leased(audit, limit=1, ttl_s=1.0), leased(audit, limit=1, ttl_s=1.0)
    expired(audit, lost)
    with database.write() as connection:
        assert leasing.renew(connection, [kept.id, lost.id], ttl_s=1000.0) == {kept.id}
    with database.read() as connection:
        extended = select(tables.lease.c.expires_at - tables.lease.c.created_at).where(tables.lease.c.id == kept.id)
        assert connection.execute(extended).scalar_one() > 900


# Failures.


def test_a_deferred_job_waits_for_its_time_and_is_tried_again(audit: AuditLog, database: Database) -> None:
    published(audit, chains(1))
    lease = leased(audit)
    failed(audit, lease, lease.jobs[0], Status.WAITING, backoff_s=100.0)
    with database.write() as connection:
        assert queue.promote(connection) == 0
        connection.execute(update(tables.job).values(not_before=0.0))
        assert queue.promote(connection) == 1
    assert statuses(database, "status", "attempt", "not_before", "error_kind") == [("ready", 1, None, "BadPicture")]
    assert leased(audit).jobs[0].attempt == 2


def test_promoting_leaves_jobs_that_wait_for_parents(audit: AuditLog, database: Database) -> None:
    published(audit, chains(1, "draft", "scene"))
    with database.write() as connection:
        assert queue.promote(connection) == 0
    assert statuses(database) == ["ready", "waiting"]


def test_a_failed_job_skips_everything_below_it_and_nothing_beside_it(audit: AuditLog, database: Database) -> None:
    published(audit, chains(2, "draft", "scene", "final"))
    lease = leased(audit)
    failed(audit, lease, lease.jobs[0])
    assert statuses(database) == ["failed", "skipped", "skipped", "leased", "waiting", "waiting"]
    assert statuses(database, "error")[1] == "a parent of this job did not succeed; retry the parent"


# Lost and released leases.


def test_a_lost_lease_costs_its_jobs_no_attempt_but_they_are_tried_alone(audit: AuditLog, database: Database) -> None:
    published(audit, chains(3))
    assert expired(audit, leased(audit)) == 3
    assert statuses(database, "status", "attempt", "alone") == [("ready", 0, True)] * 3
    assert ids(leased(audit)) == [1]
    assert ids(leased(audit)) == [2]


def test_jobs_that_never_met_a_crash_go_before_those_tried_alone(audit: AuditLog, database: Database) -> None:
    published(audit, chains(4))
    expired(audit, leased(audit, limit=2))
    assert ids(leased(audit)) == [3, 4]
    assert ids(leased(audit)) == [1]


def test_a_job_that_kills_its_worker_is_found_and_its_neighbours_are_not_burned(
    audit: AuditLog, database: Database
) -> None:
    poison, *others = chains(4, "draft", "scene")
    published(audit, [poison, *others])
    for _ in range(20):
        lease = try_lease(audit)
        if lease is None:
            break
        if any(job.identity == poison.identity for job in lease.jobs):
            expired(audit, lease)
        else:
            completed(audit, lease)
    assert statuses(database, "status", "attempt")[:2] == [("failed", 3), ("skipped", 0)]
    assert set(statuses(database)[2:]) == {"succeeded"}
    assert statuses(database, "error_kind")[0] == "WorkerLost"


def test_only_leases_whose_time_is_over_are_reaped(audit: AuditLog, database: Database) -> None:
    published(audit, chains(1))
    leased(audit)
    with audit.transaction() as tx:
        assert queue.reap(tx) == 0
    assert statuses(database) == ["leased"]


def test_more_lost_leases_than_one_call_reaps_are_reaped_by_the_next(audit: AuditLog, database: Database) -> None:
    published(audit, chains(queue.MAX_REAPED_LEASES + 5))
    leases = [leased(audit, limit=1) for _ in range(queue.MAX_REAPED_LEASES + 5)]
    assert expired(audit, *leases) == queue.MAX_REAPED_LEASES
    with audit.transaction() as tx:
        assert queue.reap(tx) == 5
    assert set(statuses(database)) == {"ready"}


def test_given_leases_are_reaped_before_their_time(audit: AuditLog, database: Database) -> None:
    published(audit, chains(2))
    dead, living = leased(audit, limit=1), leased(audit, limit=1)
    with audit.transaction() as tx:
        assert queue.reap(tx, lease_ids=[dead.id]) == 1
    assert statuses(database) == ["ready", "leased"]
    assert completed(audit, living) == [True]


def test_releasing_gives_the_attempt_back_and_no_one_is_suspected(audit: AuditLog, database: Database) -> None:
    published(audit, chains(2))
    lease = leased(audit)
    with audit.transaction() as tx:
        assert queue.release(tx, lease_id=lease.id) == 2
    assert statuses(database, "status", "attempt", "alone") == [("ready", 0, False)] * 2
    assert leased(audit).jobs[0].attempt == 1


def test_a_worker_that_ends_gives_its_leases_back(audit: AuditLog, database: Database) -> None:
    published(audit, chains(1))
    with audit.transaction() as tx:
        workers.register(tx, worker_id="worker-1", host="h", pid=1, device="cpu", description={})
    leased(audit)
    with audit.transaction() as tx:
        workers.stop(tx, worker_id="worker-1")
    assert statuses(database, "status", "attempt") == [("ready", 0)]


# Actions of users.


def test_retrying_reopens_failed_jobs_and_what_was_skipped_below_them(audit: AuditLog, database: Database) -> None:
    campaign_id = published(audit, chains(2, "draft", "scene", "final")).campaign_id
    lease = leased(audit)
    failed(audit, lease, lease.jobs[0])
    with audit.transaction() as tx:
        assert job_control.retry(tx, campaign_id=campaign_id, statuses=["failed"]) == 1
    assert statuses(database)[:3] == ["ready", "waiting", "waiting"]
    assert statuses(database, "attempt", "error_kind", "error")[:3] == [(0, None, None)] * 3
    assert ids(leased(audit)) == [1]


def test_retrying_a_join_with_another_dead_parent_leaves_it_skipped(audit: AuditLog, database: Database) -> None:
    left, right = job_spec("a", stage="left"), job_spec("a", stage="right")
    joined = job_spec("a", stage="joined", parents=(left, right))
    campaign_id = published(audit, [left, right, joined, job_spec("a", stage="last", parents=(joined,))]).campaign_id
    lease = leased(audit, limit=1)
    failed(audit, lease, lease.jobs[0])
    with audit.transaction() as tx:
        job_control.cancel(tx, campaign_id=campaign_id)
    with audit.transaction() as tx:
        job_control.retry(tx, campaign_id=campaign_id, statuses=["failed"])
    assert statuses(database) == ["ready", "cancelled", "skipped", "skipped"]


def test_retrying_leaves_alone_what_is_being_made(audit: AuditLog, database: Database) -> None:
    campaign_id = published(audit, chains(2)).campaign_id
    lease = leased(audit)
    failed(audit, lease, lease.jobs[0])
    with audit.transaction() as tx:
        job_control.retry(tx, campaign_id=campaign_id, statuses=["failed", "cancelled"])
    assert statuses(database) == ["ready", "leased"]
    assert completed(audit, lease) == [False, True]


def test_what_has_not_ended_cannot_be_retried(audit: AuditLog, database: Database) -> None:
    campaign_id = published(audit, chains(1)).campaign_id
    with audit.transaction() as tx, pytest.raises(BadInputError, match="leased cannot be retried"):
        job_control.retry(tx, campaign_id=campaign_id, statuses=["leased"])


def test_cancelling_ends_what_has_not_ended_and_takes_the_lease_away(audit: AuditLog, database: Database) -> None:
    campaign_id = published(audit, chains(3, "draft", "scene")).campaign_id
    completed(audit, leased(audit, limit=1))
    lease = leased(audit, limit=1)
    with audit.transaction() as tx:
        assert job_control.cancel(tx, campaign_id=campaign_id) == 5
    assert statuses(database) == ["succeeded", *["cancelled"] * 5]
    assert completed(audit, lease) == [False]
    assert try_lease(audit) is None


@on_postgresql
def test_a_parent_that_finishes_while_its_child_is_retried_is_counted(audit: AuditLog, database: Database) -> None:
    left, right = job_spec("a", stage="left"), job_spec("a", stage="right")
    campaign_id = published(audit, [left, right, job_spec("a", stage="joined", parents=(left, right))]).campaign_id
    first, second = leased(audit, limit=1), leased(audit, limit=1)
    failed(audit, first, first.jobs[0])
    finishing = threading.Thread(target=completed, args=(AuditLog(database, actor="worker:other"), second))
    with audit.transaction() as tx:
        job_control.retry(tx, campaign_id=campaign_id, statuses=["failed"])
        finishing.start()
        finishing.join(0.5)
    finishing.join()
    assert statuses(database, "status", "parents_left") == [("ready", 0), ("succeeded", 0), ("waiting", 1)]


@on_postgresql
def test_a_job_someone_is_changing_is_promoted_later(audit: AuditLog, database: Database) -> None:
    published(audit, chains(2))
    lease = leased(audit)
    for job in lease.jobs:
        failed(audit, lease, job, Status.WAITING, backoff_s=-1.0)
    with database.write() as other, database.write() as connection:
        other.execute(update(tables.job).where(tables.job.c.id == 1).values(error="being changed"))
        assert queue.promote(connection) == 1


def test_a_lease_asks_the_database_through_the_index_of_ready_jobs(audit: AuditLog, database: Database) -> None:
    published(audit, chains(50))
    statement = leasing.next_ready_jobs(1, 8, alone=False, after=(100, 7))
    with database.write() as connection:
        sql = str(statement.compile(database.writer, compile_kwargs={"literal_binds": True}))
        if database.is_sqlite:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}").all()
        else:
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")  # a sequential scan is right for 50 rows
            plan = connection.exec_driver_sql(f"EXPLAIN {sql}").all()
    assert "ix_job_ready" in str(plan)
    assert "TEMP B-TREE" not in str(plan)
    assert "Sort" not in str(plan)


def test_stored_pictures_keep_every_measured_value(audit: AuditLog, database: Database) -> None:
    published(audit, chains(1))
    lease = leased(audit)
    completed(audit, lease)
    with database.read() as connection:
        row = connection.execute(select(tables.image)).mappings().one()
    asked = stored_image(lease.jobs[0])
    assert all(row[name] == getattr(asked, name) for name in asked.__dataclass_fields__)
