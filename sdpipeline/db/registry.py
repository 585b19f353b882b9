"""Checkpoint registry: the approved checkpoint of each alias, who approved it, and revocations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, null, or_, select, update

from sdpipeline.db.audit import Event, Transaction
from sdpipeline.db.connection import insert_ignoring, now_s
from sdpipeline.db.descendants import skip_descendants
from sdpipeline.db.locks import lock_campaigns
from sdpipeline.db.queue import abandon_attempts
from sdpipeline.db.tables import checkpoint, group_checkpoint, job, work_group
from sdpipeline.domain import Json
from sdpipeline.engine.checkpoints import CheckpointFiles

REVOKED = "checkpoint-revoked"
"""The rule that blocks a job whose weights were revoked."""

_UNFINISHED = ("waiting", "ready", "leased")


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """Terms under which weights may run; ``expires_at`` is in seconds since 1970.

    ``conversion`` is the record of the conversion of a single file: its name, SHA-256, the converter and its options.
    """

    approved_by: str
    source: str | None = None
    licence: str | None = None
    purposes: Sequence[str] = ()
    expires_at: float | None = None
    conversion: Json | None = None


def known(connection: Connection) -> list[CheckpointFiles]:
    """List the approved checkpoints, oldest first: of two rows for one alias the later one counts."""
    in_force = (
        checkpoint.c.revoked_at.is_(None),
        or_(checkpoint.c.expires_at.is_(None), checkpoint.c.expires_at > now_s()),
    )
    rows = connection.execute(select(checkpoint).where(*in_force).order_by(checkpoint.c.created_at))
    return [_files(row) for row in rows]


def withdrawn(connection: Connection) -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
    """Return revoked digests, whatever their alias, and (digest, alias) whose approval has expired."""
    revoked = select(checkpoint.c.digest).where(checkpoint.c.revoked_at.is_not(None))
    over = select(checkpoint.c.digest, checkpoint.c.alias).where(checkpoint.c.expires_at <= now_s())
    expired = frozenset((row.digest, row.alias) for row in connection.execute(over))
    return frozenset(connection.execute(revoked).scalars()), expired


def documents(connection: Connection) -> list[Json]:
    """List every row, as ``checkpoints list --json`` shows it."""
    columns = [column for column in checkpoint.columns if column.name not in ("manifest", "ignored")]
    rows = connection.execute(select(*columns).order_by(checkpoint.c.alias, checkpoint.c.created_at)).mappings()
    return [dict(row) for row in rows]


def remember(tx: Transaction, used: Iterable[CheckpointFiles]) -> None:
    """Record the checkpoints that a campaign uses, including shipped ones and those of the deployment's folder."""
    # Held until the commit, so that a concurrent revocation waits and then finds the jobs that use the checkpoint.
    rows = select(checkpoint.c.digest, checkpoint.c.alias).order_by(checkpoint.c.digest, checkpoint.c.alias)
    present = {(row.digest, row.alias) for row in tx.connection.execute(rows.with_for_update(read=True))}
    for files in used:
        if (files.digest, files.alias) not in present:
            _insert(tx, files, Approval(approved_by=tx.actor, licence=files.licence))


def add(tx: Transaction, files: CheckpointFiles, approval: Approval) -> None:
    """Approve weights under an alias, which means them from now on; also lifts a revocation."""
    same = (checkpoint.c.digest == files.digest, checkpoint.c.alias == files.alias)
    tx.connection.execute(checkpoint.delete().where(*same))
    again = {"revoked_at": null(), "revoked_because": null()}
    tx.connection.execute(update(checkpoint).where(checkpoint.c.digest == files.digest).values(**again))
    _insert(tx, files, approval)


def with_registered_defaults(tx: Transaction, files: CheckpointFiles) -> CheckpointFiles:
    """Return weights with the native size and defaults of their earlier registration under this alias, if there is one.

    So a renewed approval makes no picture anew. Rows of releases that kept neither have None and no defaults.
    """
    same = (checkpoint.c.digest == files.digest, checkpoint.c.alias == files.alias)
    row = tx.connection.execute(select(checkpoint.c.native_size, checkpoint.c.defaults).where(*same)).first()
    return files if row is None else replace(files, native_size=row.native_size, defaults=row.defaults or {})


def revoke(tx: Transaction, digest: str, *, because: str) -> int:
    """Revoke weights everywhere, so that no job with them is leased any more; return the number of blocked jobs."""
    rows = update(checkpoint).where(checkpoint.c.digest == digest)
    tx.connection.execute(rows.values(revoked_at=now_s(), revoked_because=because))
    tx.record(Event.CHECKPOINT_REVOKED, f"checkpoint:{digest[:16]}", digest=digest)
    users = select(group_checkpoint.c.group_id).where(group_checkpoint.c.digest == digest)
    lock_campaigns(tx.connection, and_(job.c.group_id.in_(users), job.c.status.in_(_UNFINISHED)))
    blocked = block(tx.connection, job.c.status.in_(_UNFINISHED))
    if blocked:
        subject = f"checkpoint:{digest[:16]}"
        tx.record(Event.JOBS_BLOCKED, subject, jobs=sorted(blocked), rule=REVOKED)
        skip_descendants(tx, blocked, subject)
    return len(blocked)


def block_published(tx: Transaction, *, campaign_id: int, version_id: int) -> None:
    """Block jobs just published whose weights were revoked between the file's check and now."""
    # Query the groups, which are few: scanning all jobs would take a sixth of a submit's time.
    own = _revoked_groups().join(work_group, work_group.c.id == group_checkpoint.c.group_id)
    if tx.connection.execute(own.where(work_group.c.campaign_id == campaign_id).limit(1)).first() is None:
        return
    mine = and_(job.c.campaign_id == campaign_id, job.c.version_id == version_id, job.c.status.in_(_UNFINISHED))
    blocked = block(tx.connection, mine)
    if blocked:
        tx.record(Event.JOBS_BLOCKED, f"campaign:{campaign_id}", jobs=sorted(blocked), rule=REVOKED)
        skip_descendants(tx, blocked, f"campaign:{campaign_id}")


def block(connection: Connection, chosen: ColumnElement[bool]) -> list[int]:
    """Block those of the chosen jobs that need revoked weights; a worker that holds one loses its lease."""
    mine = (chosen, job.c.group_id.in_(_revoked_groups()))
    ended = {"status": "blocked", "lease_id": null(), "not_before": null(), "finished_at": now_s()}
    why = {"error_kind": REVOKED, "error": "a checkpoint it needs was revoked: see sdpipeline checkpoints list"}
    statement = update(job).where(*mine).values(**ended, **why).returning(job.c.id)
    blocked = list(connection.execute(statement).scalars())
    if blocked:
        abandon_attempts(connection, _revoked_groups())
    return blocked


def _revoked_groups() -> Select[int]:
    """Select the groups that need revoked weights."""
    needed = select(group_checkpoint.c.group_id)
    needed = needed.join(checkpoint, checkpoint.c.digest == group_checkpoint.c.digest)
    return needed.where(checkpoint.c.revoked_at.is_not(None))


def _insert(tx: Transaction, files: CheckpointFiles, approval: Approval) -> None:
    names = ("digest", "alias", "kind", "family", "scale", "size_bytes", "native_size", "origin_sha256")
    row: dict[str, Any] = {name: getattr(files, name) for name in names}
    row |= {name: getattr(approval, name) for name in ("approved_by", "source", "licence", "expires_at")}
    row |= {"location": str(files.directory), "manifest": dict(files.manifest), "purposes": list(approval.purposes)}
    row |= {"defaults": dict(files.defaults), "ignored": list(files.ignored)}
    statement = insert_ignoring(tx.connection, checkpoint).values(created_at=now_s(), **row)
    if tx.connection.execute(statement.returning(checkpoint.c.digest)).first() is None:
        return  # another submit was first
    terms = {"licence": approval.licence, "purposes": list(approval.purposes), "expires_at": approval.expires_at}
    learned: Json = {"native_size": files.native_size, "defaults": dict(files.defaults), "ignored": list(files.ignored)}
    learned["conversion"] = approval.conversion
    about = {"alias": files.alias, "digest": files.digest} | terms | {k: v for k, v in learned.items() if v}
    tx.record(Event.CHECKPOINT_ADDED, f"checkpoint:{files.digest[:16]}", **about)


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
        native_size=row.native_size,
        defaults=row.defaults or {},
        origin_sha256=row.origin_sha256,
        licence=row.licence,
        purposes=tuple(row.purposes),
        ignored=tuple(row.ignored or ()),
    )
