"""The audit log's rows: one hash chain per writer process, written inside the transition's own transaction."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import rfc8785
from sqlalchemy import Connection, func, insert, select

from sdpipeline.db.connection import Database, insert_ignoring
from sdpipeline.db.tables import audit_event, audit_seal, audit_seal_range
from sdpipeline.domain import Json

GENESIS = "0" * 64


class Event(StrEnum):
    """Everything that is written down."""

    CAMPAIGN_SUBMITTED = "campaign.submitted"
    CAMPAIGN_PAUSED = "campaign.paused"
    CAMPAIGN_RESUMED = "campaign.resumed"
    JOBS_CANCELLED = "jobs.cancelled"
    JOBS_RETRIED = "jobs.retried"
    JOBS_SKIPPED = "jobs.skipped"
    LEASE_TAKEN = "lease.taken"
    LEASE_RELEASED = "lease.released"
    LEASE_EXPIRED = "lease.expired"
    JOB_SUCCEEDED = "job.succeeded"
    JOB_FAILED = "job.failed"
    JOB_DEFERRED = "job.deferred"
    WORKER_STARTED = "worker.started"
    WORKER_STOPPED = "worker.stopped"
    CHECKPOINT_ADDED = "checkpoint.added"
    CHECKPOINT_REVOKED = "checkpoint.revoked"


@dataclass(slots=True)
class Transaction:
    """An open transaction and the events that will be committed with it."""

    connection: Connection
    writer_id: str
    actor: str
    seq: int
    head: str
    _rows: list[Json] = field(default_factory=list)

    def record(self, event: Event, subject: str, **details: Any) -> None:
        """Append one event; ``details`` must be JSON without floats' NaN and without personal data."""
        body = canonical_event(
            writer=self.writer_id,
            seq=self.seq,
            prev=self.head,
            actor=self.actor,
            event=event,
            subject=subject,
            **details,
        )
        self.head = hashlib.sha256(body.encode()).hexdigest()
        row = {"writer_id": self.writer_id, "seq": self.seq, "body": body, "hash": self.head, "subject": subject}
        self._rows.append(row)
        self.seq += 1

    def flush(self) -> None:
        """Send the collected events; called once, before the commit."""
        if self._rows:
            self.connection.execute(insert(audit_event), self._rows)


class AuditLog:
    """One process's chain of events. Transactions are taken one at a time."""

    def __init__(self, database: Database, *, actor: str) -> None:
        self.database = database
        self.actor = actor
        self._lock = threading.Lock()
        self._start_chain()

    def _start_chain(self) -> None:
        self.writer_id, self._seq, self._head = secrets.token_hex(16), 0, GENESIS

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """One write transaction whose events extend the chain when, and only when, it commits."""
        with self._lock:
            try:
                with self.database.write() as connection:
                    tx = Transaction(connection, self.writer_id, self.actor, self._seq, self._head)
                    yield tx
                    tx.flush()
            except BaseException:
                # Whether a commit arrived is unknown after a lost connection, so this chain ends here.
                self._start_chain()
                raise
            self._seq, self._head = tx.seq, tx.head


def canonical_event(*, event: Event, **fields: Any) -> str:
    """The RFC 8785 bytes of one event; these, not the database's idea of JSON, are hashed."""
    return rfc8785.dumps({"v": 1, "at_ms": time.time_ns() // 1_000_000, "event": str(event), **fields}).decode()


def unsealed_ranges(connection: Connection) -> list[tuple[str, int, int]]:
    """(writer, first, last sequence number) of every chain's events that no seal covers yet."""
    sealed = (
        select(audit_seal_range.c.writer_id, func.max(audit_seal_range.c.last_seq).label("last"))
        .group_by(audit_seal_range.c.writer_id)
        .subquery()
    )
    rows = connection.execute(
        select(audit_event.c.writer_id, func.min(audit_event.c.seq), func.max(audit_event.c.seq))
        .outerjoin(sealed, sealed.c.writer_id == audit_event.c.writer_id)
        .where(audit_event.c.seq > func.coalesce(sealed.c.last, -1))
        .group_by(audit_event.c.writer_id)
        .order_by(audit_event.c.writer_id)
    )
    return [(writer, first, last) for writer, first, last in rows]


def bodies(connection: Connection, ranges: Sequence[tuple[str, int, int]]) -> Iterator[bytes]:
    """The events of the given ranges, in their order: the leaves of a seal's Merkle tree."""
    for writer, first, last in ranges:
        statement = (
            select(audit_event.c.body)
            .where(audit_event.c.writer_id == writer, audit_event.c.seq.between(first, last))
            .order_by(audit_event.c.seq)
            .execution_options(yield_per=1000)
        )
        for body in connection.execute(statement).scalars():
            yield body.encode()


def insert_seal(connection: Connection, seal: Json, ranges: Sequence[tuple[str, int, int]]) -> bool:
    """Store a seal and what it covers; False if another sealer was first with this number."""
    if not connection.execute(insert_ignoring(connection, audit_seal).values(**seal)).rowcount:
        return False
    rows = [
        {"number": seal["number"], "writer_id": writer, "first_seq": first, "last_seq": last}
        for writer, first, last in ranges
    ]
    connection.execute(insert(audit_seal_range), rows)
    return True


def last_seal(connection: Connection) -> Json | None:
    """The newest seal's row."""
    row = connection.execute(select(audit_seal).order_by(audit_seal.c.number.desc()).limit(1)).mappings().first()
    return dict(row) if row else None


def seals(connection: Connection) -> list[Json]:
    """All seals with their ranges, oldest first."""
    ranges: dict[int, list[tuple[str, int, int]]] = {}
    for row in connection.execute(
        select(audit_seal_range).order_by(audit_seal_range.c.number, audit_seal_range.c.writer_id)
    ):
        ranges.setdefault(row.number, []).append((row.writer_id, row.first_seq, row.last_seq))
    rows = connection.execute(select(audit_seal).order_by(audit_seal.c.number)).mappings()
    return [dict(row) | {"ranges": ranges.get(row["number"], [])} for row in rows]


def events(connection: Connection) -> Iterator[tuple[Any, Json]]:
    """Every event row with its parsed body, chain by chain in order."""
    statement = select(audit_event).order_by(audit_event.c.writer_id, audit_event.c.seq)
    for row in connection.execute(statement.execution_options(yield_per=1000)):
        yield row, json.loads(row.body)
