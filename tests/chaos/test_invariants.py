"""The invariant check itself: it detects damage that faults could cause."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from sdpipeline.audit import load_key
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database
from sdpipeline.db.tables import attempt, audit_event, image, job
from sdpipeline.storage import LocalStore
from tests.chaos.invariants import Orphans, orphans, violations
from tests.factories import chains, completed, leased, published
from tests.integration.databases import on_sqlite

pytestmark = [pytest.mark.chaos, on_sqlite]

Wrong = Callable[[Connection], object]


def _first_job(**values: object) -> Wrong:
    return lambda connection: connection.execute(update(job).where(job.c.id == 1).values(**values))


def _lost_event(which: ColumnElement[bool]) -> Wrong:
    return lambda connection: connection.execute(delete(audit_event).where(which))


def _an_event_twice(connection: Connection) -> None:
    rows = connection.execute(select(audit_event).order_by(audit_event.c.seq)).mappings().all()
    (told,) = [row for row in rows if json.loads(row["body"])["event"] == "job.succeeded" and row["subject"] == "job:1"]
    connection.execute(insert(audit_event).values(dict(told) | {"seq": len(rows)}))


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        (_first_job(status="ready"), "job 1 is ready"),
        (
            lambda c: c.execute(update(job).where(job.c.id == 1).values(status="failed", error="x")),
            "job 1 is failed: x",
        ),
        (lambda c: c.execute(delete(image).where(image.c.job_id == 1)), "job 1 has 0 pictures"),
        (lambda c: c.execute(update(image).values(job_id=2, fingerprint=image.c.sha256)), "job 2 has 2 pictures"),
        (_first_job(attempt=21), "job 1 made 21 attempts"),
        (_lost_event(audit_event.c.subject == "job:1"), "job 1 succeeded 0 times"),
        (_an_event_twice, "job 1 succeeded 2 times"),
        (_lost_event(audit_event.c.seq == 1), "event-missing"),
        (lambda c: c.execute(update(attempt).values(outcome=None)), "job 1 has an open attempt"),
    ],
)
def test_what_the_database_has_wrong_is_seen(
    audit: AuditLog, database: Database, tmp_path: Path, wrong: Wrong, seen: str
) -> None:
    store, key = LocalStore(tmp_path / "storage"), load_key(tmp_path / "seal.pem", create=True)
    published(audit, chains(2))
    completed(audit, leased(audit), store)
    assert violations(database, store, key) == []
    with database.write() as connection:
        wrong(connection)
    assert [found for found in violations(database, store, key) if seen in found]


def test_what_storage_has_wrong_is_seen(audit: AuditLog, database: Database, tmp_path: Path) -> None:
    store, key = LocalStore(tmp_path / "storage"), load_key(tmp_path / "seal.pem", create=True)
    published(audit, chains(2))
    completed(audit, leased(audit), store)
    store.put("default/spring/draft/f/lost.png", b"of an attempt that died", content_type="image/png")
    assert violations(database, store, key) == []
    assert orphans(database, store) == Orphans(pictures=1, sidecars=0)
    with database.read() as connection:
        first, second = connection.execute(select(image.c.key).order_by(image.c.job_id)).scalars()
    (tmp_path / "storage" / first).write_bytes(b"other bytes")
    (tmp_path / "storage" / second).unlink()
    found = violations(database, store, key)
    assert [line.split(" ")[0] for line in found] == ["object-altered", "object-missing"]
