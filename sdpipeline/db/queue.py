"""Job transitions: one function per transition, each one short transaction with its audit event."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, case, exists, insert, null, select, true, update

from sdpipeline.db import budgets, similar_images
from sdpipeline.db.audit import Event, Transaction
from sdpipeline.db.budgets import Charge
from sdpipeline.db.connection import now_s
from sdpipeline.db.descendants import count_down_children, skip_descendants
from sdpipeline.db.locks import share_campaigns
from sdpipeline.db.tables import LEASED, READY, WAITING, attempt, image, job, lease, work_group
from sdpipeline.domain import Json, Status, digest
from sdpipeline.jobs import LeasedJob, StoredImage

MAX_REAPED_LEASES = 100
MAX_PROMOTED_JOBS = 1000
"""Limit per transaction; the next call takes the rest."""


def complete(tx: Transaction, *, lease_id: str, leased: LeasedJob, stored: StoredImage, charge: Charge) -> bool:
    """Record the picture; if the lease was lost meanwhile, write nothing and return False."""
    share_campaigns(tx.connection, job.c.id == leased.id)
    row = tx.connection.execute(
        update(job)
        .where(_lease_still_held(lease_id, leased.id), job.c.fingerprint == leased.fingerprint)
        .values(status="succeeded", lease_id=null(), error_kind=null(), error=null(), finished_at=now_s())
        .returning(job.c.campaign_id, job.c.group_id, job.c.salt, job.c.identity, job.c.request, job.c.subject)
    ).first()
    if row is None:
        return False
    fields = {name: getattr(stored, name) for name in StoredImage.__dataclass_fields__}
    tx.connection.execute(
        insert(image).values(
            job_id=leased.id,
            attempt=leased.attempt,
            fingerprint=leased.fingerprint,
            worker_id=charge.worker_id,
            created_at=now_s(),
            **fields,
            **(similar_images.looks(stored.scores) if stored.reused_from is None else {}),
        )
    )
    _end_attempt(tx.connection, leased.id, lease_id, "succeeded", gpu_seconds=charge.gpu_seconds, cost=charge.cost)
    spent = None
    if stored.reused_from is None:
        spent = budgets.spend(tx.connection, row.campaign_id, row.group_id, charge, size_bytes=stored.size_bytes)
    count_down_children(tx.connection, leased.id)
    tx.record(
        Event.JOB_SUCCEEDED,
        f"job:{leased.id}",
        lease=lease_id,
        attempt=leased.attempt,
        identity=row.identity,
        fingerprint=leased.fingerprint,
        commitment=commitment(row.salt, row.request),
        worker=charge.worker_id,
        image=audited_fields(fields, row.subject),
        spent=spent,
    )
    return True


def recorded(connection: Connection, *, lease_id: str, leased: LeasedJob) -> StoredImage | None:
    """Return the picture that :func:`complete` recorded for this job under this lease, or None."""
    names = StoredImage.__dataclass_fields__
    ours = and_(attempt.c.job_id == leased.id, attempt.c.lease_id == lease_id, attempt.c.outcome == "succeeded")
    found = connection.execute(
        select(*(image.c[name] for name in names))
        .join(attempt, and_(attempt.c.job_id == image.c.job_id, attempt.c.fingerprint == image.c.fingerprint))
        .where(ours, image.c.fingerprint == leased.fingerprint, image.c.attempt == leased.attempt)
    ).mappings()
    row = found.first()
    return None if row is None else StoredImage(**row)


def audited_fields(fields: Json, subject: str | None) -> Json:
    """Return a picture's fields for the audit log, without the scores of a subject's picture.

    The log is kept for ever, and the perceptual hash would let a subject's picture be recognised.
    """
    return fields if subject is None else {name: value for name, value in fields.items() if name != "scores"}


def fail(
    tx: Transaction,
    *,
    lease_id: str,
    leased: LeasedJob,
    status: Status,
    error_kind: str,
    error: str,
    charge: Charge,
    backoff_s: float = 0.0,
) -> bool:
    """End an attempt with an error; return False if the lease was lost.

    The job becomes ``failed`` for good, ``blocked`` if the error is a policy's rule, or ``waiting`` for a retry after
    ``backoff_s``.
    """
    share_campaigns(tx.connection, job.c.id == leased.id)
    retry = status is Status.WAITING
    row = tx.connection.execute(
        update(job)
        .where(_lease_still_held(lease_id, leased.id))
        .values(
            status=str(status),
            lease_id=null(),
            error_kind=error_kind,
            error=error,
            not_before=(now_s() + backoff_s) if retry else null(),
            finished_at=null() if retry else now_s(),
        )
        .returning(job.c.campaign_id, job.c.group_id)
    ).first()
    if row is None:
        return False
    problem = {"error_kind": error_kind, "error": error}
    spent = {"gpu_seconds": charge.gpu_seconds, "cost": charge.cost}
    _end_attempt(tx.connection, leased.id, lease_id, "failed", **problem, **spent)
    details: Json = {"lease": lease_id, "attempt": leased.attempt, "fingerprint": leased.fingerprint, "spent": None}
    details["worker"] = charge.worker_id
    if charge.gpu_seconds:
        details["spent"] = budgets.spend(tx.connection, row.campaign_id, row.group_id, charge, size_bytes=None)
    event = Event.JOB_DEFERRED if retry else Event.JOB_FAILED
    details |= {"rule": error} if status is Status.BLOCKED else {}
    tx.record(event, f"job:{leased.id}", error_kind=error_kind, **details)
    if not retry:
        skip_descendants(tx, [leased.id], f"job:{leased.id}")
    return True


def release(tx: Transaction, *, lease_id: str) -> int:
    """Return a lease's unfinished jobs to their previous state; their attempt does not count."""
    # The campaign's lock first, then the lease's row: cancel and submit take them in this order too.
    share_campaigns(tx.connection, and_(job.c.lease_id == lease_id, job.c.status == LEASED))
    mine = and_(lease.c.id == lease_id, lease.c.closed_at.is_(None))
    tx.connection.execute(update(lease).where(mine).values(closed_at=now_s()))
    held = _lock_leased_jobs(tx.connection, [lease_id])
    _end_attempts(tx.connection, [lease_id], "released")
    if not held:
        return 0
    _make_ready(tx.connection, held, attempt=job.c.attempt - 1)
    tx.record(Event.LEASE_RELEASED, f"lease:{lease_id}", jobs=[[row.id, row.attempt - 1] for row in held])
    return len(held)


def reap(tx: Transaction, *, lease_ids: Collection[str] | None = None) -> int:
    """Close expired leases (or the given ones) and make their jobs ready again, to be leased alone.

    Only an attempt made alone counts, and the last of those fails the job. So a job that kills its worker is found, and
    its neighbours lose no attempts.
    """
    closed = _close_expired(tx.connection, lease_ids)
    if not closed:
        return 0
    held = _lock_leased_jobs(tx.connection, closed)
    _end_attempts(tx.connection, closed, "expired")
    exhausted = [row for row in held if row.alone and row.attempt >= row.max_attempts]
    retried = [row for row in held if not row.alone or row.attempt < row.max_attempts]
    # An attempt made together with others is given back; one made alone counts.
    _make_ready(
        tx.connection, retried, attempt=case((job.c.alone, job.c.attempt), else_=job.c.attempt - 1), alone=true()
    )
    for lease_id in closed:
        jobs = [[row.id, row.attempt - (not row.alone)] for row in retried if row.lease_id == lease_id]
        tx.record(Event.LEASE_EXPIRED, f"lease:{lease_id}", jobs=jobs)
    _fail_exhausted(tx, exhausted)
    return len(held)


def _close_expired(connection: Connection, lease_ids: Collection[str] | None) -> list[str]:
    expired = lease.c.id.in_(lease_ids) if lease_ids is not None else lease.c.expires_at < now_s()
    still_open = and_(lease.c.closed_at.is_(None), expired)
    found = select(lease.c.id).where(still_open).order_by(lease.c.expires_at).limit(MAX_REAPED_LEASES)
    candidates = list(connection.execute(found).scalars())
    if not candidates:
        return []
    # The campaign's lock first, then the lease's row: cancel and submit take them in this order too.
    share_campaigns(connection, and_(job.c.lease_id.in_(candidates), job.c.status == LEASED))
    mine = select(lease.c.id).where(lease.c.id.in_(candidates), still_open)
    picked = mine.order_by(lease.c.id).with_for_update(skip_locked=True).cte("picked")
    close = update(lease).where(lease.c.id.in_(select(picked.c.id))).values(closed_at=now_s()).returning(lease.c.id)
    return list(connection.execute(close).scalars())


def _lock_leased_jobs(connection: Connection, lease_ids: Collection[str]) -> Sequence[Any]:
    """Lock and return the unfinished jobs of these leases."""
    ours = and_(job.c.lease_id.in_(lease_ids), job.c.status == LEASED)
    share_campaigns(connection, ours)
    columns = (job.c.id, job.c.lease_id, job.c.attempt, job.c.max_attempts, job.c.alone, job.c.fingerprint)
    return connection.execute(select(*columns).where(ours).order_by(job.c.id).with_for_update()).all()


def _make_ready(connection: Connection, held: Sequence[Any], **values: Any) -> None:
    ids = [row.id for row in held]
    if ids:
        connection.execute(update(job).where(job.c.id.in_(ids)).values(status=READY, lease_id=null(), **values))


def _fail_exhausted(tx: Transaction, held: Sequence[Any]) -> None:
    ids = [row.id for row in held]
    if not ids:
        return
    lost = "the worker that ran this job alone was lost at every attempt"
    values = {"status": "failed", "lease_id": null(), "finished_at": now_s(), "error_kind": "WorkerLost", "error": lost}
    tx.connection.execute(update(job).where(job.c.id.in_(ids)).values(**values))
    for row in held:
        about = {"lease": row.lease_id, "attempt": row.attempt, "fingerprint": row.fingerprint, "spent": None}
        tx.record(Event.JOB_FAILED, f"job:{row.id}", error_kind="WorkerLost", **about)
    skip_descendants(tx, ids, f"lease:{held[0].lease_id}")


def promote(connection: Connection) -> int:
    """Make jobs ready again when their back-off is over; skip locked ones until the next call."""
    due = (
        select(job.c.id)
        .where(job.c.status == WAITING, job.c.not_before.is_not(None), job.c.not_before <= now_s())
        .order_by(job.c.not_before)
        .limit(MAX_PROMOTED_JOBS)
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    ready = update(job).where(job.c.id.in_(select(due.c.id))).values(status=READY, not_before=null())
    return len(connection.execute(ready.returning(job.c.id)).all())


def abandon_attempts(connection: Connection, groups: Select[int]) -> None:
    """End these groups' attempts whose job lost its lease, and close the leases left without a job.

    Call it after the update of the jobs, never before. A lease that commits while that update waits for its rows is not
    in the snapshot of any earlier statement. A worker whose lease was closed skips its next forward pass.
    """
    leases = select(lease.c.id).where(lease.c.closed_at.is_(None), lease.c.group_id.in_(groups))
    lease_ids = list(connection.execute(leases).scalars())
    if not lease_ids:
        return
    lost = and_(attempt.c.lease_id.in_(lease_ids), ~attempt_is_leased())
    ended = {"finished_at": now_s(), "outcome": "abandoned"}
    connection.execute(update(attempt).where(attempt.c.outcome.is_(None), lost).values(**ended))
    holding = select(job.c.lease_id).where(job.c.lease_id.in_(lease_ids), job.c.status == LEASED)
    empty = and_(lease.c.id.in_(lease_ids), lease.c.closed_at.is_(None), lease.c.id.not_in(holding))
    locked = select(lease.c.id).where(empty).order_by(lease.c.id).with_for_update().cte("locked")
    connection.execute(update(lease).where(lease.c.id.in_(select(locked.c.id))).values(closed_at=now_s()))


def abandon_campaign_attempts(connection: Connection, campaign_id: int) -> None:
    """Call :func:`abandon_attempts` for all groups of a campaign."""
    abandon_attempts(connection, select(work_group.c.id).where(work_group.c.campaign_id == campaign_id))


def attempt_is_leased() -> ColumnElement[bool]:
    """Return the condition that an attempt's job is leased under the attempt's lease."""
    same = (job.c.id == attempt.c.job_id, job.c.lease_id == attempt.c.lease_id)
    return exists().where(*same, job.c.status == LEASED).correlate(attempt)


def commitment(salt: str, request: Json) -> str:
    """Hash a request with its salt for audit events: not readable, and meaningless once the salt is deleted."""
    return digest([salt, request])


def _lease_still_held(lease_id: str, job_id: int) -> ColumnElement[bool]:
    """Return the fencing condition: a worker whose lease was closed matches no row."""
    return and_(job.c.id == job_id, job.c.lease_id == lease_id, job.c.status == LEASED)


def _end_attempt(connection: Connection, job_id: int, lease_id: str, outcome: str, **more: Any) -> None:
    mine = and_(attempt.c.job_id == job_id, attempt.c.lease_id == lease_id)
    connection.execute(update(attempt).where(mine).values(finished_at=now_s(), outcome=outcome, **more))


def _end_attempts(connection: Connection, lease_ids: Collection[str], outcome: str) -> None:
    still_open = and_(attempt.c.lease_id.in_(lease_ids), attempt.c.outcome.is_(None))
    connection.execute(update(attempt).where(still_open).values(finished_at=now_s(), outcome=outcome))
