"""Checkpoints that have been used: alias, digest and where the weights lie."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select, update

from sdpipeline.db.audit import Event, Transaction
from sdpipeline.db.connection import now_s
from sdpipeline.db.tables import checkpoint
from sdpipeline.engine.checkpoints import CheckpointFiles


def known(connection: Connection) -> list[CheckpointFiles]:
    """Every checkpoint that was not revoked."""
    rows = connection.execute(select(checkpoint).where(checkpoint.c.revoked_at.is_(None)).order_by(checkpoint.c.alias))
    return [_files(row) for row in rows]


def remember(tx: Transaction, used: Iterable[CheckpointFiles]) -> None:
    """Write down checkpoints; an alias whose weights changed now means the new ones."""
    present = {row.alias: row.digest for row in tx.connection.execute(select(checkpoint.c.alias, checkpoint.c.digest))}
    for files in used:
        if present.get(files.alias) == files.digest:
            continue
        row = {name: getattr(files, name) for name in ("digest", "kind", "family", "scale", "size_bytes")}
        row |= {"location": str(files.directory), "manifest": dict(files.manifest)}
        if files.alias in present:
            statement = update(checkpoint).where(checkpoint.c.alias == files.alias).values(**row)
            tx.connection.execute(statement.values(created_at=now_s()))
        else:
            tx.connection.execute(checkpoint.insert().values(alias=files.alias, created_at=now_s(), **row))
        tx.record(Event.CHECKPOINT_ADDED, f"checkpoint:{files.digest[:16]}", alias=files.alias, digest=files.digest)


def _files(row: Any) -> CheckpointFiles:
    return CheckpointFiles(
        alias=row.alias,
        digest=row.digest,
        kind=row.kind,
        family=row.family,
        directory=Path(row.location),
        scale=row.scale,
        manifest=row.manifest,
        size_bytes=row.size_bytes,
    )
