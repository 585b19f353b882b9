"""Worker rows: registration, heartbeat, notes and orderly stop."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection, insert, null, select, update

from sdpipeline.db.audit import Event, Transaction
from sdpipeline.db.connection import now_s
from sdpipeline.db.leasing import open_leases
from sdpipeline.db.queue import release
from sdpipeline.db.tables import worker
from sdpipeline.domain import Json, digest

STORAGE_LOSSES = "storage_losses"
"""The key in a worker's description."""


def register(tx: Transaction, *, worker_id: str, host: str, pid: int, device: str, description: Json) -> None:
    """Register a worker process."""
    times = {"started_at": now_s(), "seen_at": now_s()}
    row = {"id": worker_id, "host": host, "pid": pid, "device": device, "description": description}
    tx.connection.execute(insert(worker).values(**row, **times))
    tx.record(Event.WORKER_STARTED, f"worker:{worker_id}", device=device, software=digest(description))


def seen(connection: Connection, worker_id: str) -> None:
    """Record a worker's heartbeat."""
    connection.execute(update(worker).where(worker.c.id == worker_id).values(seen_at=now_s()))


def note(connection: Connection, worker_id: str, text: str | None, *, paused: bool = False) -> None:
    """Set the reason why a worker waits or paused itself, shown by ``status``; None clears it."""
    values = {"seen_at": now_s(), "note": text, "paused_at": now_s() if paused else null()}
    connection.execute(update(worker).where(worker.c.id == worker_id).values(**values))


def set_note_if_none(connection: Connection, worker_id: str, text: str) -> None:
    """Set the reason why a worker waits, unless it has another note."""
    mine = (worker.c.id == worker_id, worker.c.note.is_(None))
    connection.execute(update(worker).where(*mine).values(note=text))


def remove_note(connection: Connection, worker_id: str, text: str) -> None:
    """Remove that note, and no other."""
    mine = (worker.c.id == worker_id, worker.c.note == text)
    connection.execute(update(worker).where(*mine).values(note=null()))


def set_storage_losses(connection: Connection, worker_id: str, losses: Mapping[str, str]) -> None:
    """Set the features that storage refuses to a worker, each with its consequence, shown by ``status``."""
    mine = worker.c.id == worker_id
    description = connection.execute(select(worker.c.description).where(mine)).scalar_one_or_none()
    if description is not None:
        changed = {**description, STORAGE_LOSSES: dict(losses)}
        connection.execute(update(worker).where(mine).values(description=changed))


def stop(tx: Transaction, *, worker_id: str) -> None:
    """Record an orderly stop of a worker, and release its leases."""
    for lease_id in open_leases(tx.connection, [worker_id]):
        release(tx, lease_id=lease_id)
    tx.connection.execute(update(worker).where(worker.c.id == worker_id).values(stopped_at=now_s()))
    tx.record(Event.WORKER_STOPPED, f"worker:{worker_id}")
