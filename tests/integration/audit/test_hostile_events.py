"""Invented events of a database login: `audit verify` names each and continues, and no worker fails because of them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from sqlalchemy import delete, insert

from sdpipeline.audit import SealKey, load_key, verify
from sdpipeline.audit.export import write
from sdpipeline.audit.offline import verify_export
from sdpipeline.audit.seals import digest
from sdpipeline.db import budgets, registry, settings_events, workers
from sdpipeline.db.audit import GENESIS, AuditLog
from sdpipeline.db.connection import Database
from sdpipeline.db.registry import Approval
from sdpipeline.db.tables import audit_event
from sdpipeline.domain import Json
from sdpipeline.storage import LocalStore
from tests.factories import chains, checkpoint_files, completed, events, leased, published
from tests.integration.databases import on_postgresql, on_sqlite

MADE_UP = "f" * 32
WORKER = "worker:worker-1 sdpipeline/1"


@pytest.fixture
def store(database: Database, tmp_path: Path) -> LocalStore:
    """Storage of a database that has rows of every kind for events to be compared with."""
    user, worker, store = AuditLog(database, actor="user:boss"), AuditLog(database, actor=WORKER), LocalStore(tmp_path)
    with worker.transaction() as tx:
        workers.register(tx, worker_id="worker-1", host="h", pid=1, device="cpu", description={})
        settings_events.declare(tx, "marks", {"signed": True})
    with user.transaction() as tx:
        registry.add(tx, checkpoint_files("shapes"), Approval(approved_by="boss"))
    published(user, chains(2), budget={"max_images": 10})
    with worker.transaction() as tx:
        budgets.admit(tx, wave=8)
    completed(worker, leased(worker, limit=1), store)
    return store


@pytest.fixture
def key(tmp_path: Path) -> SealKey:
    return load_key(tmp_path / "key.pem", create=True)


def write_made_up(database: Database, body: str, subject: str = "x") -> None:
    row = {"writer_id": MADE_UP, "seq": 0, "body": body, "hash": digest(body), "subject": subject}
    with database.write() as connection:
        connection.execute(delete(audit_event).where(audit_event.c.writer_id == MADE_UP))
        connection.execute(insert(audit_event).values(**row))


def exported(database: Database, key: SealKey) -> io.BytesIO:
    file = io.BytesIO()
    write(database, key, file)
    file.seek(0)
    return file


SPENT = {"campaign": 1, "group": 1, "images": 10**400, "size_bytes": 1, "gpu_seconds": 1.0, "cost": 1.0}
HOSTILE: dict[str, tuple[str, Json]] = {
    "a subject that is a number": ("job.succeeded", {"subject": 1}),
    "a number beyond floats": ("job.succeeded", {"spent": SPENT}),
    "a picture that is none": ("job.succeeded", {"image": 5}),
    "scores that are none": ("job.succeeded", {"image": {"key": "k", "sha256": "s", "scores": [5]}}),
    "a number that is a text": ("worker.started", {"seq": "0"}),
    "a foreign event before all others": ("audit.chain_taken", {"chain": MADE_UP, "first": -(10**18)}),
    "foreign events without end": ("audit.chain_taken", {"chain": MADE_UP, "first": 0, "seq": 10**18}),
    "a gap without end": ("audit.gap", {"first_seal": 1, "last_seal": 10**18, "events": 1, "missing": []}),
    "a version without its number": ("campaign.submitted", {"version": None}),
    "settings that are none": ("settings.changed", {"values": None}),
}


def hostile(database: Database, name: str) -> str:
    """The bytes of that event, based on a real event of the same kind if there is one."""
    kind, other = HOSTILE[name]
    about = {"v": 1, "actor": WORKER, "writer": MADE_UP, "seq": 0, "prev": GENESIS}
    known: Json = next((event for event in events(database) if event["event"] == kind), {"subject": "x"})
    event = known | about | {"event": kind, "at_us": 2 * 10**15} | other
    return json.dumps({field: value for field, value in event.items() if value is not None})


@on_sqlite
@pytest.mark.parametrize("name", HOSTILE)
def test_a_made_up_event_does_not_end_the_verification_of_a_database_or_an_export(
    database: Database, store: LocalStore, key: SealKey, name: str
) -> None:
    body = hostile(database, name)
    write_made_up(database, body, str(json.loads(body)["subject"]))
    assert f"event:{MADE_UP}/0" in {fault.subject for fault in verify(database, store, key).faults}
    assert verify_export(exported(database, key)).faults


@on_postgresql
def test_an_event_that_is_nested_without_end_stops_neither_the_verification_nor_a_worker(
    database: Database, store: LocalStore, key: SealKey
) -> None:
    """PostgreSQL accepts it, because its triggers parse deeper nesting than Python does."""
    head = json.dumps({"v": 1, "actor": WORKER, "event": "settings.changed", "subject": "settings:marks", "at_us": 1})
    nested = "[" * 3000 + "]" * 3000
    body = f'{head[:-1]}, "writer": "{MADE_UP}", "seq": 0, "prev": "{GENESIS}", "values": {nested}}}'
    write_made_up(database, body, "settings:marks")
    assert {fault.kind for fault in verify(database, store, key).faults} == {"event-altered"}
    worker = AuditLog(database, actor=WORKER)
    with worker.transaction() as tx:
        assert settings_events.declare(tx, "marks", {"signed": False})
