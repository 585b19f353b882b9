"""The audit log: recorded events, seals, and the faults that verification finds, on SQLite and PostgreSQL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Table, delete, select, update
from sqlalchemy.event import listen, remove

from sdpipeline.audit import Fault, SealKey, load_key, seal, verify
from sdpipeline.db import job_control, leasing, queue, workers
from sdpipeline.db.audit import GENESIS, AuditLog, Event
from sdpipeline.db.connection import Database
from sdpipeline.db.tables import audit_event, audit_seal, audit_seal_range, image, job
from sdpipeline.domain import Json, Status
from sdpipeline.errors import AuditBrokenError
from sdpipeline.storage import LocalStore
from sdpipeline.storage.keys import seal_object_key
from tests.factories import chains, completed, events, expired, failed, job_spec, leased, published
from tests.integration.databases import on_sqlite


@dataclass(frozen=True, slots=True)
class Archive:
    """A database with finished work, its storage and its seal key."""

    database: Database
    audit: AuditLog
    store: LocalStore
    key: SealKey
    folder: Path

    def faults(self) -> list[Fault]:
        return verify(self.database, self.store, self.key).faults

    def kinds(self) -> set[str]:
        return {fault.kind for fault in self.faults()}

    def seal(self) -> int:
        return seal(self.database, self.store, self.key)

    def edit(self, table: Table, where: Any, **values: Any) -> None:
        with self.database.write() as connection:
            connection.execute(update(table).where(where).values(**values))

    def file(self, suffix: str) -> Path:
        return next(path for path in sorted(self.folder.rglob(f"*{suffix}")) if "audit" not in path.parts)


@pytest.fixture
def archive(database: Database, audit: AuditLog, tmp_path: Path) -> Archive:
    """Two pictures, a failed job with its skipped child, and one job in every other state; sealed twice."""
    kept = Archive(
        database, audit, LocalStore(tmp_path / "s"), load_key(tmp_path / "key.pem", create=True), tmp_path / "s"
    )
    published(audit, chains(7, "draft", "scene"))
    lease = leased(audit, limit=5)
    failed(audit, lease, lease.jobs[1])
    failed(audit, lease, lease.jobs[2], Status.WAITING, backoff_s=100.0)
    completed(audit, lease, kept.store)
    kept.seal()
    expired(audit, leased(audit, limit=1))
    leased(audit, limit=1)
    released = leased(audit, limit=1)
    with audit.transaction() as tx:
        queue.release(tx, lease_id=released.id)
    other = published(audit, chains(1), name="cancelled")
    with audit.transaction() as tx:
        job_control.cancel(tx, campaign_id=other.campaign_id)
    kept.seal()
    return kept


def test_a_clean_archive_has_no_faults(archive: Archive) -> None:
    found = verify(archive.database, archive.store, archive.key)
    assert found.faults == []
    assert (found.seals, found.unsealed, found.skipped) == (2, 0, 0)
    assert found.images > 0
    assert found.events == len(events(archive.database))


def test_an_archive_stays_clean_through_changes_retries_and_revivals(archive: Archive) -> None:
    published(archive.audit, [*list(chains(6, "draft", "scene")), job_spec("row-6", prompt="changed")], prune=True)
    assert archive.faults() == []
    with archive.audit.transaction() as tx:
        job_control.retry(tx, campaign_id=1, statuses=["failed", "cancelled"])
    assert archive.faults() == []
    published(archive.audit, chains(7, "draft", "scene"))
    assert archive.faults() == []
    for _ in range(4):
        completed(archive.audit, leased(archive.audit, campaign_id=1), archive.store)
        assert archive.faults() == []


def test_a_sample_says_what_it_left_out(archive: Archive) -> None:
    found = verify(archive.database, archive.store, archive.key, sample=1)
    assert (found.images, found.faults) == (1, [])
    assert found.skipped == verify(archive.database, archive.store, archive.key).images - 1


# Recorded events.


def test_every_transition_is_written_in_its_own_transaction(archive: Archive) -> None:
    with archive.audit.transaction() as tx:
        workers.register(tx, worker_id="worker-1", host="h", pid=1, device="cpu", description={})
        job_control.set_campaign_status(tx, campaign_id=1, status="paused")
        job_control.set_campaign_status(tx, campaign_id=1, status="active")
        job_control.retry(tx, campaign_id=1, statuses=["failed"])
        workers.stop(tx, worker_id="worker-1")
    published(archive.audit, [job_spec("row-0", prompt="changed")])
    elsewhere = ("checkpoint.", "jobs.blocked", "jobs.erased", "pictures.", "inputs.", "sources.", "edition.")
    reconciled = {Event.JOB_ADOPTED, Event.JOBS_REOPENED, Event.IMAGE_LOST, Event.OBJECT_QUARANTINED, Event.AUDIT_GAP}
    reconciled |= {Event.SETTINGS_CHANGED, Event.CHAIN_TAKEN}
    of_jobs = {str(event) for event in Event if not event.startswith(elsewhere) and event not in reconciled}
    assert {event["event"] for event in events(archive.database)} == of_jobs


def test_a_rollback_leaves_no_event_and_the_chain_goes_on(audit: AuditLog, database: Database) -> None:
    published(audit, chains(2))

    def interrupted() -> None:
        with audit.transaction() as tx:
            leasing.take_lease(tx, worker_id="w", limit=1, ttl_s=60)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    leased(audit)
    told = events(database)
    assert [(event["seq"], event["event"]) for event in told] == [(0, "campaign.submitted"), (1, "lease.taken")]
    assert len({event["writer"] for event in told}) == 1


def test_a_commit_whose_answer_is_lost_ends_the_chain(audit: AuditLog, database: Database) -> None:
    published(audit, chains(3))

    def lose_the_answer(connection: Connection) -> None:
        driver: Any = connection.connection.dbapi_connection
        driver.commit()
        raise OSError("the answer is lost")

    listen(database.writer, "commit", lose_the_answer)
    with pytest.raises(OSError, match="lost"):
        leased(audit, limit=1)
    remove(database.writer, "commit", lose_the_answer)
    assert len(leased(audit).jobs) == 2
    assert sorted(event["seq"] for event in events(database)) == [0, 0, 1]


def test_each_chain_continues_its_own_events(audit: AuditLog, database: Database) -> None:
    other = AuditLog(database, actor="worker:other")
    published(audit, chains(4))
    for log in (audit, other, audit, other):
        completed(log, leased(log, limit=1))
    chained: dict[str, str] = {}
    for event in events(database):
        assert event["prev"] == chained.get(event["writer"], GENESIS)
        with database.read() as connection:
            own = (audit_event.c.writer_id == event["writer"]) & (audit_event.c.seq == event["seq"])
            body = connection.execute(select(audit_event.c.body).where(own)).scalar_one()
        chained[event["writer"]] = hashlib.sha256(body.encode()).hexdigest()
    assert len(chained) == 2


def test_events_hold_no_prompt(archive: Archive) -> None:
    with archive.database.read() as connection:
        told = " ".join(connection.execute(select(audit_event.c.body)).scalars())
    assert "a picture of" not in told


# Seals.


def test_a_seal_covers_what_came_since_the_last_and_nothing_twice(archive: Archive) -> None:
    assert archive.seal() == 0
    published(archive.audit, chains(1), name="new")
    assert archive.seal() == 1


def test_a_seal_that_reached_only_storage_is_taken_up(archive: Archive) -> None:
    published(archive.audit, chains(1), name="new")
    archive.seal()
    with archive.database.write() as connection:
        connection.execute(delete(audit_seal_range).where(audit_seal_range.c.number == 3))
        connection.execute(delete(audit_seal).where(audit_seal.c.number == 3))
    assert archive.faults() == []
    published(archive.audit, chains(1), name="newer")
    assert (archive.seal(), archive.seal()) == (1, 1)
    assert archive.faults() == []


def test_a_restored_backup_is_recognised_and_nothing_is_sealed_over_it(archive: Archive) -> None:
    forget(archive, after_seal=1)
    assert "database-too-old" in archive.kinds()
    published(archive.audit, chains(1), name="new")
    with pytest.raises(AuditBrokenError, match="backup"):
        archive.seal()


def forget(archive: Archive, *, after_seal: int) -> None:
    """Delete all seals after this one and their events, as if an older backup had been restored."""
    later = audit_seal_range.c.number > after_seal
    with archive.database.write() as connection:
        for row in connection.execute(select(audit_seal_range).where(later)).all():
            mine = audit_event.c.writer_id == row.writer_id
            connection.execute(delete(audit_event).where(mine, audit_event.c.seq >= row.first_seq))
        connection.execute(delete(audit_seal_range).where(later))
        connection.execute(delete(audit_seal).where(audit_seal.c.number > after_seal))


# Faults that verification finds. Each test changes one thing by hand.


def rehashed(body: Json) -> dict[str, str]:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return {"body": text, "hash": hashlib.sha256(text.encode()).hexdigest()}


def edited_event(archive: Archive) -> None:
    archive.edit(audit_event, audit_event.c.seq == 1, body=audit_event.c.body + " ")


def rehashed_event(archive: Archive) -> None:
    event = events(archive.database)[2]
    mine = (audit_event.c.writer_id == event["writer"]) & (audit_event.c.seq == event["seq"])
    archive.edit(audit_event, mine, **rehashed(event | {"actor": "user:someone-else"}))


def event_that_is_none(archive: Archive) -> None:
    archive.edit(audit_event, audit_event.c.seq == 1, **rehashed({"not": "an event"}))


def deleted_event(archive: Archive) -> None:
    with archive.database.write() as connection:
        connection.execute(delete(audit_event).where(audit_event.c.seq == 2))


def last_sealed_event_deleted(archive: Archive) -> None:
    with archive.database.write() as connection:
        last = select(audit_event.c.seq).order_by(audit_event.c.seq.desc()).limit(1).scalar_subquery()
        connection.execute(delete(audit_event).where(audit_event.c.seq == last))


def seal_dropped(archive: Archive) -> None:
    with archive.database.write() as connection:
        connection.execute(delete(audit_seal_range).where(audit_seal_range.c.number == 1))
        connection.execute(delete(audit_seal).where(audit_seal.c.number == 1))


def seal_edited(archive: Archive) -> None:
    archive.edit(audit_seal, audit_seal.c.number == 1, body=audit_seal.c.body + " ")


def seal_missing_in_storage(archive: Archive) -> None:
    (archive.folder / seal_object_key(1)).unlink()


def picture_byte(archive: Archive) -> None:
    path = archive.file(".png")
    path.chmod(0o644)
    path.write_bytes(b"P" + path.read_bytes()[1:])


def sidecar(archive: Archive) -> None:
    path = archive.file(".json")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b" ")


def object_gone(archive: Archive) -> None:
    archive.file(".png").unlink()


def image_row_gone(archive: Archive) -> None:
    with archive.database.write() as connection:
        connection.execute(delete(image).where(image.c.job_id == 1))


@on_sqlite
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (edited_event, "event-altered"),
        (rehashed_event, "chain-broken"),
        (event_that_is_none, "event-altered"),
        (deleted_event, "event-missing"),
        (last_sealed_event_deleted, "sealed-events-altered"),
        (seal_dropped, "seal-missing"),
        (seal_edited, "seal-invalid"),
        (seal_missing_in_storage, "seal-missing"),
        (picture_byte, "object-altered"),
        (sidecar, "object-altered"),
        (object_gone, "object-missing"),
        (image_row_gone, "image-missing"),
    ],
)
def test_a_change_by_hand_is_found(archive: Archive, change: Callable[[Archive], None], kind: str) -> None:
    change(archive)
    assert kind in archive.kinds()


def test_an_event_rewritten_with_all_that_follow_is_found_by_its_seal(archive: Archive) -> None:
    head = GENESIS
    for event in sorted(events(archive.database), key=lambda each: each["seq"]):
        row = rehashed(event | {"prev": head, "actor": "user:someone-else"})
        head = row["hash"]
        archive.edit(audit_event, audit_event.c.seq == event["seq"], **row)
    assert "sealed-events-altered" in archive.kinds()


def test_every_field_of_a_finished_job_that_counts_is_covered(archive: Archive) -> None:
    changes: dict[str, list[Any]] = {
        "identity": ["0" * 64],
        "row_key": ["another"],
        "seed": [7],
        "fingerprint": ["0" * 64],
        "status": ["ready", "failed", "cancelled"],
        "attempt": [0, 2],
        "salt": ["0" * 32],
    }
    missed = [(name, value) for name, values in changes.items() for value in values if not found(archive, name, value)]
    assert missed == []
    assert archive.faults() == []


def found(archive: Archive, name: str, value: Any) -> bool:
    """Return True if verification finds a change of this field of job 1; the change is undone."""
    with archive.database.read() as connection:
        before = connection.execute(select(job.c[name]).where(job.c.id == 1)).scalar_one()
    archive.edit(job, job.c.id == 1, **{name: value})
    faults = archive.faults()
    archive.edit(job, job.c.id == 1, **{name: before})
    return any((fault.kind, fault.subject) == ("job-altered", "job:1") for fault in faults)


def test_a_changed_request_is_found(archive: Archive) -> None:
    with archive.database.read() as connection:
        asked = connection.execute(select(job.c.request).where(job.c.id == 1)).scalar_one()
    archive.edit(job, job.c.id == 1, request=asked | {"prompt": "something else"})
    assert archive.kinds() == {"job-altered"}


@on_sqlite
def test_a_status_changed_by_hand_is_found_whatever_it_was(archive: Archive) -> None:
    with archive.database.read() as connection:
        rows = connection.execute(select(job.c.id, job.c.status)).all()
    assert {row.status for row in rows} == {"succeeded", "failed", "skipped", "leased", "waiting", "ready", "cancelled"}
    for row in rows:
        for status in {"succeeded", "failed", "ready", "cancelled"} - {row.status}:
            if (row.status, status) == ("waiting", "ready"):
                continue  # a transition that happens without a user
            archive.edit(job, job.c.id == row.id, status=status)
            assert "job-altered" in archive.kinds(), (row.status, status)
            archive.edit(job, job.c.id == row.id, status=row.status)


def test_a_job_smuggled_in_or_out_of_a_published_version_is_found(archive: Archive) -> None:
    archive.edit(job, job.c.id == 3, version_id=2)
    assert "campaign-altered" in archive.kinds()


@on_sqlite
def test_every_field_of_a_picture_that_counts_is_covered(archive: Archive) -> None:
    for column in image.columns:
        if column.name in ("job_id", "fingerprint", "created_at"):
            continue
        with archive.database.read() as connection:
            before = connection.execute(select(column).where(image.c.job_id == 1)).scalar_one()
        wrong = 9 if isinstance(before, int | float) or column.name == "deleted_at" else "another"
        archive.edit(image, image.c.job_id == 1, **{column.name: wrong})
        assert "image-altered" in archive.kinds(), column.name
        archive.edit(image, image.c.job_id == 1, **{column.name: before})
    assert archive.faults() == []
