"""Rows of the audit log: one hash chain per writer process, written in the transition's own transaction."""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import rfc8785
from sqlalchemy import ColumnElement, Connection, func, insert, literal_column, select
from sqlalchemy.exc import IntegrityError

from sdpipeline.db.connection import Database, insert_ignoring, now_s
from sdpipeline.db.tables import audit_event, audit_seal, audit_seal_range, audit_writer
from sdpipeline.domain import Json
from sdpipeline.errors import ChainTakenError

GENESIS = "0" * 64
_SESSION_USER: ColumnElement[str] = literal_column("session_user::text")


class Event(StrEnum):
    """Kinds of audit events."""

    CAMPAIGN_SUBMITTED = "campaign.submitted"
    CAMPAIGN_PAUSED = "campaign.paused"
    CAMPAIGN_RESUMED = "campaign.resumed"
    JOBS_CHANGED = "jobs.changed"
    JOBS_BLOCKED = "jobs.blocked"
    JOBS_CANCELLED = "jobs.cancelled"
    JOBS_RETRIED = "jobs.retried"
    JOBS_SKIPPED = "jobs.skipped"
    LEASE_TAKEN = "lease.taken"
    LEASE_RELEASED = "lease.released"
    LEASE_EXPIRED = "lease.expired"
    JOB_SUCCEEDED = "job.succeeded"
    JOB_FAILED = "job.failed"
    JOB_DEFERRED = "job.deferred"
    JOB_ADOPTED = "job.adopted"
    JOBS_REOPENED = "jobs.reopened"
    IMAGE_LOST = "image.lost"
    OBJECT_QUARANTINED = "object.quarantined"
    AUDIT_GAP = "audit.gap"
    CHAIN_TAKEN = "audit.chain_taken"
    WORKER_STARTED = "worker.started"
    WORKER_STOPPED = "worker.stopped"
    PICTURES_DELETED = "pictures.deleted"
    JOBS_ERASED = "jobs.erased"
    INPUTS_DELETED = "inputs.deleted"
    SOURCES_DELETED = "sources.deleted"
    EDITION_ARCHIVED = "edition.archived"
    CHECKPOINT_ADDED = "checkpoint.added"
    CHECKPOINT_REVOKED = "checkpoint.revoked"
    SETTINGS_CHANGED = "settings.changed"


@dataclass(slots=True)
class Transaction:
    """An open transaction and the events that will be committed with it."""

    connection: Connection
    writer_id: str
    actor: str
    seq: int
    head: str
    _events: list[Json] = field(default_factory=list)

    def record(self, event: Event, subject: str, **details: Any) -> None:
        """Append one event; ``details`` must be JSON without NaN and without personal data.

        Record a transition after the statement that made it, because its row locks order the events of one job.
        """
        self._events.append({"event": str(event), "subject": subject, **details})

    def flush(self) -> None:
        """Chain and send the collected events; called once, before the commit."""
        if not self._events:
            return
        stamp, rows = {"actor": self.actor} | _stamp(self.connection), []
        for event in self._events:
            body = canonical_event({"writer": self.writer_id, "seq": self.seq, "prev": self.head} | stamp | event)
            self.head = hashlib.sha256(body.encode()).hexdigest()
            row = {"writer_id": self.writer_id, "seq": self.seq, "body": body, "hash": self.head}
            rows.append(row | {"subject": event["subject"]})
            self.seq += 1
        try:
            self.connection.execute(insert(audit_event), rows)
        except IntegrityError as error:
            first = f"{rows[0]['writer_id']}/{rows[0]['seq']}"
            raise ChainTakenError(
                f"another process wrote audit event {first}: this process begins a new chain"
            ) from error


class AuditLog:
    """One process's chain of events; only one transaction is open at a time."""

    def __init__(self, database: Database, *, actor: str) -> None:
        self.database = database
        self.actor = actor
        self._lock = threading.Lock()
        self._taken: list[tuple[str, int]] = []
        self._start_chain()

    def _start_chain(self) -> None:
        self._pid = os.getpid()
        self.writer_id, self._seq, self._head = secrets.token_hex(16), 0, GENESIS

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Open a write transaction whose events extend the chain if and only if it commits."""
        with self._lock:
            if self._pid != os.getpid():
                self._start_chain()
            with self.database.write() as connection:
                tx = Transaction(connection, self.writer_id, self.actor, self._seq, self._head)
                for writer_id, seq in self._taken:
                    tx.record(Event.CHAIN_TAKEN, f"event:{writer_id}/{seq}", chain=writer_id, first=seq)
                yield tx
                self._flush(tx)
                # A failed commit may have been applied, so continue the old chain only after a successful one.
                self._start_chain()
            self.writer_id, self._seq, self._head = tx.writer_id, tx.seq, tx.head
            self._taken.clear()

    def _flush(self, tx: Transaction) -> None:
        """Send the events. If another process continued this chain, begin a new one whose first event says so."""
        begun = (self.writer_id, self._seq)
        try:
            tx.flush()
        except ChainTakenError:
            self._taken.append(begun)
            self._start_chain()
            raise


def canonical_event(event: Json) -> str:
    """Return the RFC 8785 bytes of one event; these are hashed, not the database's form of JSON."""
    return rfc8785.dumps({"v": 1} | event).decode()


def _stamp(connection: Connection) -> Json:
    """Return time and database login for new events.

    All writers use one clock: the server's on PostgreSQL, the machine's on SQLite (whose own has milliseconds). SQLite
    has no logins.
    """
    if connection.dialect.name == "sqlite":
        return {"at_us": time.time_ns() // 1000}
    clock, login = connection.execute(select(now_s(), _SESSION_USER)).one()
    return {"at_us": int(clock * 1e6), "login": login}


def unsealed_ranges(connection: Connection) -> list[tuple[str, int, int]]:
    """List (writer, first, last sequence number) of every chain's events that no seal covers yet.

    Each chain takes two look-ups in the primary key, however many events are sealed. A recursion skips from one writer
    to the next, because neither database does so by itself.
    """
    own = audit_event.c
    chains = select(func.min(own.writer_id).label("writer")).cte("chains", recursive=True)
    following = select(func.min(own.writer_id)).where(own.writer_id > chains.c.writer).scalar_subquery()
    chains = chains.union_all(select(following).where(chains.c.writer.is_not(None)))
    sealed = (
        select(audit_seal_range.c.writer_id, func.max(audit_seal_range.c.last_seq).label("last"))
        .group_by(audit_seal_range.c.writer_id)
        .subquery()
    )
    open_events = (own.writer_id == chains.c.writer, own.seq > func.coalesce(sealed.c.last, -1))
    first = select(func.min(own.seq)).where(*open_events).scalar_subquery()
    last = select(func.max(own.seq)).where(*open_events).scalar_subquery()
    joined = chains.outerjoin(sealed, sealed.c.writer_id == chains.c.writer)
    rows = connection.execute(select(chains.c.writer, first, last).select_from(joined).order_by(chains.c.writer))
    return [(writer, begin, end) for writer, begin, end in rows if begin is not None]


def bodies(connection: Connection, ranges: Sequence[tuple[str, int, int]]) -> Iterator[bytes]:
    """Yield the events of the given ranges, in their order: the leaves of a seal's Merkle tree."""
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
    """Store a seal and its ranges; return False if another sealer was first with this number."""
    statement = insert_ignoring(connection, audit_seal).values(**seal).execution_options(preserve_rowcount=True)
    if not connection.execute(statement).rowcount:
        return False
    rows = [
        {"number": seal["number"], "writer_id": writer, "first_seq": first, "last_seq": last}
        for writer, first, last in ranges
    ]
    if rows:
        connection.execute(insert(audit_seal_range), rows)
    return True


def seals_after(connection: Connection, number: int, *, limit: int) -> list[Json]:
    """List the next seals after that number, each with its ranges in this database, oldest first."""
    page = select(audit_seal).where(audit_seal.c.number > number).order_by(audit_seal.c.number).limit(limit)
    found = [dict(row) | {"ranges": []} for row in connection.execute(page).mappings()]
    own = audit_seal_range.c
    covered = select(audit_seal_range).where(own.number.in_([row["number"] for row in found]))
    by_number = {row["number"]: row["ranges"] for row in found}
    for row in connection.execute(covered):
        by_number[row.number].append((row.writer_id, row.first_seq, row.last_seq))
    return found


def seal_over(connection: Connection, writer_id: str, seq: int) -> Json | None:
    """Return the row of the seal that covers an event; None if there is none."""
    own = audit_seal_range.c
    covers = (own.writer_id == writer_id, own.first_seq <= seq, own.last_seq >= seq)
    number = select(own.number).where(*covers).limit(1).scalar_subquery()
    row = connection.execute(select(audit_seal).where(audit_seal.c.number == number)).mappings().first()
    return dict(row) if row else None


def about(connection: Connection, subject: str) -> list[Any]:
    """List all events of one subject, in no particular order."""
    return list(connection.execute(select(audit_event).where(audit_event.c.subject == subject)))


def holding(connection: Connection, text: str) -> list[Any]:
    """List all events that contain this text of letters and digits; scans the whole log."""
    return list(connection.execute(select(audit_event).where(audit_event.c.body.contains(text))))


def last_seal(connection: Connection) -> Json | None:
    """Return the newest seal's row; None if there is none."""
    row = connection.execute(select(audit_seal).order_by(audit_seal.c.number.desc()).limit(1)).mappings().first()
    return dict(row) if row else None


def newest_sequences(connection: Connection, writers: Collection[str]) -> dict[str, int]:
    """Return the last sequence number of each of these chains that the database has."""
    newest = select(audit_event.c.writer_id, func.max(audit_event.c.seq)).group_by(audit_event.c.writer_id)
    rows = connection.execute(newest.where(audit_event.c.writer_id.in_(writers)))
    return {writer: int(seq) for writer, seq in rows}


def seals(connection: Connection) -> list[Json]:
    """List all seals with their ranges, oldest first."""
    ranges: dict[int, list[tuple[str, int, int]]] = {}
    for row in connection.execute(
        select(audit_seal_range).order_by(audit_seal_range.c.number, audit_seal_range.c.writer_id)
    ):
        ranges.setdefault(row.number, []).append((row.writer_id, row.first_seq, row.last_seq))
    rows = connection.execute(select(audit_seal).order_by(audit_seal.c.number)).mappings()
    return [dict(row) | {"ranges": ranges.get(row["number"], [])} for row in rows]


def events(connection: Connection) -> Iterator[Any]:
    """Yield every event row, chain by chain, in order."""
    statement = select(audit_event).order_by(audit_event.c.writer_id, audit_event.c.seq)
    yield from connection.execute(statement.execution_options(yield_per=1000))


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """The database login that a chain is bound to; None for a chain that ended before logins were recorded.

    ``kind`` is "worker" or "sealer" if that login may write only the events of such a process.
    """

    login: str | None
    kind: str | None
    actor: str | None


def writers(connection: Connection) -> dict[str, Writer]:
    """Return the login of every chain, by writer; empty on SQLite."""
    columns = (audit_writer.c.writer_id, audit_writer.c.login, audit_writer.c.kind, audit_writer.c.actor)
    rows = connection.execute(select(*columns))
    return {row.writer_id: Writer(login=row.login, kind=row.kind, actor=row.actor) for row in rows}
