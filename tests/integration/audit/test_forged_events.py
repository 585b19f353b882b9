"""Forged events and changed rows of campaigns, costs and checkpoints: `audit verify` names each, on both databases."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, insert, text, update

from sdpipeline.audit import SealKey, load_key, seal, verify
from sdpipeline.audit.export import write
from sdpipeline.audit.offline import verify_export
from sdpipeline.audit.seals import digest
from sdpipeline.db import budgets, job_control, registry, workers
from sdpipeline.db.audit import GENESIS, AuditLog, Event, canonical_event, writers
from sdpipeline.db.budgets import Charge
from sdpipeline.db.connection import Database
from sdpipeline.db.registry import Approval
from sdpipeline.db.tables import attempt, audit_event, audit_writer, campaign, campaign_version, checkpoint, spending
from sdpipeline.domain import Json, Status
from sdpipeline.errors import ChainTakenError
from sdpipeline.storage import LocalStore
from tests.factories import chains, checkpoint_files, completed, events, failed, leased, published
from tests.integration.databases import on_postgresql

WORKER = "worker:worker-1 sdpipeline/1"


@dataclass(frozen=True, slots=True)
class Ledger:
    """A database with two campaigns of different teams, and the logs of a dispatcher and of a worker."""

    database: Database
    user: AuditLog
    worker: AuditLog
    store: LocalStore
    key: SealKey

    def kinds(self) -> set[str]:
        return {fault.kind for fault in verify(self.database, self.store, self.key).faults}

    def subjects(self, kind: str) -> set[str]:
        return {fault.subject for fault in verify(self.database, self.store, self.key).faults if fault.kind == kind}

    def edit(self, statement: Any) -> None:
        with self.database.write() as connection:
            connection.execute(statement)

    def forge(self, actor: str, event: Event, subject: str, *, into: AuditLog | None = None, **details: Any) -> str:
        """Insert a well-formed event, bypassing the triggers as the tables' owner could; return its name."""
        writer, seq, head = ("f" * 32, 0, GENESIS) if into is None else (into.writer_id, into._seq, into._head)
        told: Json = {"writer": writer, "seq": seq, "prev": head, "actor": actor, "event": str(event)}
        if not self.database.is_sqlite:
            told |= {"login": "mallory"}
        body = canonical_event(told | {"subject": subject, "at_us": 2 * 10**15} | details)
        row = {"writer_id": writer, "seq": seq, "body": body, "hash": digest(body), "subject": subject}
        with self.database.write() as connection:
            if not self.database.is_sqlite:
                connection.execute(text("SET LOCAL session_replication_role = replica"))
            connection.execute(insert(audit_event).values(**row))
        return f"event:{writer}/{seq}"


@pytest.fixture
def ledger(database: Database, tmp_path: Path) -> Ledger:
    """Jobs that were made, failed and retried, so that every kind of cost occurs."""
    user, worker = AuditLog(database, actor="user:boss"), AuditLog(database, actor=WORKER)
    key = load_key(tmp_path / "key.pem", create=True)
    kept = Ledger(database, user, worker, LocalStore(tmp_path / "s"), key)
    with worker.transaction() as tx:
        workers.register(tx, worker_id="worker-1", host="h", pid=1, device="cpu", description={})
    with user.transaction() as tx:
        registry.add(tx, checkpoint_files("shapes"), Approval(approved_by="boss"))
    published(user, chains(3), budget={"max_images": 10.0})
    published(user, chains(1), name="other", team="other", priority=7)
    lease = leased(worker, campaign_id=2)
    charge = Charge(worker_id="worker-1", gpu_seconds=2.0, cost=0.5)
    failed(worker, lease, lease.jobs[0], Status.WAITING, charge=charge)
    with worker.transaction() as tx:
        budgets.admit(tx, wave=8)
    completed(worker, leased(worker, campaign_id=1), kept.store, gpu_second_cost=1.0)
    return kept


def test_nothing_is_found_in_honest_work(ledger: Ledger) -> None:
    with ledger.user.transaction() as tx:
        job_control.set_campaign_status(tx, campaign_id=2, status="paused")
        registry.revoke(tx, checkpoint_files("shapes").digest, because="test")
    assert ledger.kinds() == set()


CHANGES: dict[str, tuple[Any, str]] = {
    "paused": (update(campaign).values(status="paused"), "campaign-altered"),
    "paused for a budget": (update(campaign).values(status="paused", paused_because="budget"), "campaign-altered"),
    "budget removed": (update(campaign).values(budget=None), "campaign-altered"),
    "budget raised": (update(campaign).where(campaign.c.id == 1).values(budget={"max_images": 11}), "campaign-altered"),
    "budget given": (update(campaign).where(campaign.c.id == 2).values(budget={"max_images": 1}), "campaign-altered"),
    "priority": (update(campaign).values(priority=1), "campaign-altered"),
    "renamed": (update(campaign).where(campaign.c.id == 1).values(name="mine"), "campaign-altered"),
    "given away": (update(campaign).where(campaign.c.id == 1).values(team="third"), "campaign-altered"),
    "unpublished": (update(campaign).values(version_id=None), "campaign-altered"),
    "another file": (update(campaign_version).values(source="name: mine"), "campaign-altered"),
    "file deleted": (update(campaign_version).values(source=""), "campaign-altered"),
    "file by another": (update(campaign_version).values(actor="user:mallory"), "campaign-altered"),
    "cost zeroed": (update(spending).values(cost=0.0), "cost-altered"),
    "time zeroed": (update(spending).values(gpu_seconds=0.0), "cost-altered"),
    "pictures uncounted": (update(spending).values(images=0), "cost-altered"),
    "cost raised": (update(spending).values(cost=spending.c.cost + 1), "cost-altered"),
    "an attempt's cost": (update(attempt).values(cost=0.0), "cost-altered"),
    "an attempt's time": (update(attempt).values(gpu_seconds=0.0), "cost-altered"),
    "cost deleted": (delete(spending), "cost-altered"),
    "revoked": (update(checkpoint).values(revoked_at=1.0), "checkpoint-altered"),
    "licence": (update(checkpoint).values(licence="mine"), "checkpoint-altered"),
    "native size": (update(checkpoint).values(native_size=64), "checkpoint-altered"),
    "defaults": (update(checkpoint).values(defaults={"guidance_scale": 0.0}), "checkpoint-altered"),
    "ignored": (update(checkpoint).values(ignored=["unet/other.safetensors"]), "checkpoint-altered"),
    "never expires": (update(checkpoint).values(expires_at=9e9), "checkpoint-altered"),
}


def test_every_changed_row_of_campaigns_costs_and_checkpoints_is_found(ledger: Ledger) -> None:
    missed = []
    for name, (statement, kind) in CHANGES.items():
        with ledger.database.writer.connect() as connection:
            savepoint = {table: connection.execute(table.select()).mappings().all() for table in _TABLES}
        ledger.edit(statement)
        if kind not in ledger.kinds():
            missed.append(name)
        _put_back(ledger, savepoint)
    assert missed == []
    assert ledger.kinds() == set()


_TABLES = (campaign, campaign_version, spending, checkpoint, attempt)


def _put_back(ledger: Ledger, rows: dict[Any, Any]) -> None:
    with ledger.database.write() as connection:
        for table, before in rows.items():
            there = connection.execute(table.select()).first()
            for row in before:
                own = [column == row[column.name] for column in table.primary_key]
                if there is None:
                    connection.execute(insert(table).values(**row))
                else:
                    connection.execute(update(table).where(*own).values(**row))


def test_a_checkpoint_whose_revocation_was_taken_back_is_found(ledger: Ledger) -> None:
    with ledger.user.transaction() as tx:
        registry.revoke(tx, checkpoint_files("shapes").digest, because="unsafe")
    ledger.edit(update(checkpoint).values(revoked_at=None))
    assert ledger.kinds() == {"checkpoint-altered"}


FORGERIES: dict[str, Callable[[Ledger], str]] = {
    "another actor in a worker's chain": lambda it: it.forge(
        "user:boss", Event.CAMPAIGN_RESUMED, "campaign:2", into=it.worker
    ),
    "another actor in a user's chain": lambda it: it.forge(
        "user:other", Event.SETTINGS_CHANGED, "settings:marks", into=it.user, values={}
    ),
    "a worker pauses a campaign": lambda it: it.forge(
        WORKER, Event.CAMPAIGN_PAUSED, "campaign:2", into=it.worker, reason=None
    ),
    "a worker writes what a user does": lambda it: it.forge(
        WORKER, Event.JOBS_CANCELLED, "campaign:2", into=it.worker, jobs=[]
    ),
    "a worker writes of another": lambda it: it.forge(
        WORKER, Event.LEASE_TAKEN, "lease:1", into=it.worker, jobs=[], worker="worker-2"
    ),
    "a worker stops another": lambda it: it.forge(WORKER, Event.WORKER_STOPPED, "worker:worker-2", into=it.worker),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_event_is_named_by_the_database_and_by_an_export(ledger: Ledger, name: str) -> None:
    forged = FORGERIES[name](ledger)
    assert forged in ledger.subjects("event-forged")
    seal(ledger.database, ledger.store, ledger.key)
    file = io.BytesIO()
    write(ledger.database, ledger.key, file)
    found = verify_export(io.BytesIO(file.getvalue()), trusted=ledger.key.public)
    assert forged in {fault.subject for fault in found.faults if fault.kind == "event-forged"}


@on_postgresql
def test_an_event_written_around_the_triggers_is_found_by_its_login(ledger: Ledger) -> None:
    alone = ledger.forge("user:boss", Event.SETTINGS_CHANGED, "settings:marks", values={})
    appended = ledger.forge(WORKER, Event.LEASE_RELEASED, "lease:1", into=ledger.worker, jobs=[])
    assert {alone, appended} <= ledger.subjects("event-forged")


@on_postgresql
def test_a_chain_from_before_the_migration_is_bound_to_a_login_by_its_next_event(ledger: Ledger) -> None:
    ledger.edit(update(audit_writer).values(login=None, kind=None))
    with ledger.worker.transaction() as tx:
        workers.stop(tx, worker_id="worker-1")
    with ledger.database.read() as connection:
        bound = {name: each.login for name, each in writers(connection).items()}
    login = ledger.database.writer.url.username
    assert bound == {ledger.worker.writer_id: login, ledger.user.writer_id: None}
    assert ledger.kinds() == set()


def test_a_writer_whose_chain_was_continued_goes_on_in_a_new_one_and_names_the_foreign_event(ledger: Ledger) -> None:
    login = {} if ledger.database.is_sqlite else {"login": ledger.database.writer.url.username}
    forged = ledger.forge(WORKER, Event.LEASE_RELEASED, "lease:1", into=ledger.worker, jobs=[], **login)
    with pytest.raises(ChainTakenError), ledger.worker.transaction() as tx:
        workers.stop(tx, worker_id="worker-1")
    with ledger.worker.transaction() as tx:
        workers.stop(tx, worker_id="worker-1")
    assert ledger.subjects("event-forged") == {forged}
    newest = [event for event in events(ledger.database) if event["writer"] == ledger.worker.writer_id]
    assert [event["event"] for event in newest] == ["audit.chain_taken", "worker.stopped"]


def test_what_older_releases_did_not_record_is_no_fault(ledger: Ledger) -> None:
    """Events of older releases have no terms, costs or login."""
    head: dict[str, str] = {}
    with ledger.database.write() as connection:
        for row in connection.execute(audit_event.select().order_by(audit_event.c.writer_id, audit_event.c.seq)).all():
            told = json.loads(row.body)
            for name in ("team", "name", "budget", "priority", "spent", "login", "expires_at"):
                told.pop(name, None)
            body = canonical_event(told | {"prev": head.get(row.writer_id, GENESIS)})
            head[row.writer_id] = digest(body)
            own = (audit_event.c.writer_id == row.writer_id, audit_event.c.seq == row.seq)
            connection.execute(update(audit_event).where(*own).values(body=body, hash=head[row.writer_id]))
    assert ledger.kinds() == set()
