"""Reconciliation after a crash: queries for inconsistent rows, and the transitions that repair them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Select, and_, case, delete, exists, func, or_, select, tuple_, update

from sdpipeline.db import job_control, queue
from sdpipeline.db.audit import Event, Transaction
from sdpipeline.db.connection import now_s
from sdpipeline.db.descendants import descendants
from sdpipeline.db.locks import lock_campaign
from sdpipeline.db.queue import MAX_REAPED_LEASES, attempt_is_leased
from sdpipeline.db.tables import LEASED, attempt, campaign, found_picture, image, job, lease, worker
from sdpipeline.domain import Json
from sdpipeline.storage.keys import picture_folder

PAGE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """Folder of the pictures of one fingerprint, and a job whose attempt may have left objects there."""

    prefix: str
    fingerprint: str
    job_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StaleLease:
    """A lease whose worker sends no heartbeat any more."""

    lease_id: str
    jobs: int
    because: str


def open_leases(connection: Connection) -> list[str]:
    """List the leases that were not closed."""
    return list(connection.execute(select(lease.c.id).where(lease.c.closed_at.is_(None))).scalars())


def stale_leases(connection: Connection) -> list[StaleLease]:
    """List leases that expired, or whose worker has stopped."""
    held = select(func.count()).where(job.c.lease_id == lease.c.id, job.c.status == LEASED).correlate(lease)
    late = lease.c.expires_at < now_s()
    statement = (
        select(lease.c.id, lease.c.worker_id, held.scalar_subquery().label("jobs"), case((late, 1), else_=0))
        .outerjoin(worker, worker.c.id == lease.c.worker_id)
        .where(lease.c.closed_at.is_(None), or_(late, worker.c.stopped_at.is_not(None)))
        .order_by(lease.c.expires_at, lease.c.id)
    )
    return [
        StaleLease(
            lease_id=lease_id,
            jobs=jobs,
            because=f"worker {worker_id} {'let it expire' if expired else 'has stopped'}",
        )
        for lease_id, worker_id, jobs, expired in connection.execute(statement)
    ]


def reap(tx: Transaction, lease_ids: Sequence[str]) -> None:
    """Close these leases; their jobs are ready again."""
    for start in range(0, len(lease_ids), MAX_REAPED_LEASES):
        queue.reap(tx, lease_ids=lease_ids[start : start + MAX_REAPED_LEASES])


def unfinished_folders(connection: Connection) -> list[Folder]:
    """List folders in which interrupted attempts may have left objects.

    Folders that a worker is writing to just now are left out.
    """
    fingerprint = func.coalesce(attempt.c.fingerprint, job.c.fingerprint)
    other = job.alias("other")
    being_made = (
        exists()
        .where(
            other.c.fingerprint == fingerprint,
            other.c.campaign_id == job.c.campaign_id,
            other.c.stage == job.c.stage,
            other.c.status == LEASED,
            lease.c.id == other.c.lease_id,
            lease.c.closed_at.is_(None),
            lease.c.expires_at >= now_s(),
        )
        .correlate(attempt, job)
    )
    statement = (
        select(campaign.c.team, campaign.c.name, job.c.stage, fingerprint, func.min(job.c.id))
        .select_from(attempt)
        .join(job, job.c.id == attempt.c.job_id)
        .join(campaign, campaign.c.id == job.c.campaign_id)
        .where(attempt.c.outcome.is_distinct_from("succeeded"), ~being_made)
        .group_by(campaign.c.team, campaign.c.name, job.c.stage, fingerprint)
        .order_by(campaign.c.team, campaign.c.name, job.c.stage, fingerprint)
    )
    return [
        Folder(
            prefix=picture_folder(team=team, campaign=name, stage=stage, fingerprint=of), fingerprint=of, job_id=job_id
        )
        for team, name, stage, of, job_id in connection.execute(statement)
    ]


def page_of_pictures(connection: Connection, after: tuple[int, str] | None) -> Sequence[Json]:
    """Return a page of picture rows, each marked if it is the current picture of a succeeded job."""
    columns = ("job_id", "fingerprint", "key", "sha256", "sidecar_key", "sidecar_sha256")
    present = and_(job.c.fingerprint == image.c.fingerprint, job.c.status == "succeeded")
    statement = (
        select(*(image.c[name] for name in columns), job.c.campaign_id, case((present, 1), else_=0).label("present"))
        .join(job, job.c.id == image.c.job_id)
        .where(image.c.deleted_at.is_(None))  # a deleted picture is not missing
        .order_by(image.c.job_id, image.c.fingerprint)
        .limit(PAGE)
    )
    if after is not None:
        statement = statement.where(tuple_(image.c.job_id, image.c.fingerprint) > tuple_(*after))
    return [dict(row) for row in connection.execute(statement).mappings()]


def without_picture(connection: Connection) -> list[int]:
    """List jobs whose status is succeeded and that have no picture."""
    own = and_(image.c.job_id == job.c.id, image.c.fingerprint == job.c.fingerprint)
    pictureless = and_(job.c.status == "succeeded", ~exists().where(own))
    return _ids(connection, select(job.c.id).where(pictureless))


def stranded(connection: Connection) -> list[int]:
    """List jobs that are leased under a closed lease, which nothing would ever release."""
    held = and_(job.c.status == LEASED, lease.c.closed_at.is_not(None))
    return _ids(connection, select(job.c.id).join(lease, lease.c.id == job.c.lease_id).where(held))


def open_attempts(connection: Connection) -> list[tuple[int, str]]:
    """List (job, lease) of attempts left open when their job was taken from its lease.

    Only a release before this one left such attempts open.
    """
    lost = and_(attempt.c.outcome.is_(None), ~attempt_is_leased())
    statement = select(attempt.c.job_id, attempt.c.lease_id).where(lost).order_by(attempt.c.job_id, attempt.c.lease_id)
    return [(job_id, lease_id) for job_id, lease_id in connection.execute(statement)]


def end_attempts(tx: Transaction) -> None:
    """End the attempts that :func:`open_attempts` finds as abandoned."""
    attempts = open_attempts(tx.connection)
    for start in range(0, len(attempts), PAGE):
        these = tuple_(attempt.c.job_id, attempt.c.lease_id).in_(attempts[start : start + PAGE])
        lost = and_(these, attempt.c.outcome.is_(None), ~attempt_is_leased())
        tx.connection.execute(update(attempt).where(lost).values(finished_at=now_s(), outcome="abandoned"))


def delete_picture(tx: Transaction, lost: Json, *, because: str) -> bool:
    """Delete the row of a picture that storage lacks or holds altered; False if the row changed meanwhile."""
    mine = and_(image.c.job_id == lost["job_id"], image.c.fingerprint == lost["fingerprint"])
    same = and_(mine, image.c.sidecar_sha256 == lost["sidecar_sha256"])
    if not tx.connection.execute(delete(image).where(same).returning(image.c.job_id)).first():
        return False
    about = {name: lost[name] for name in ("fingerprint", "key", "sha256", "sidecar_sha256")}
    tx.record(Event.IMAGE_LOST, f"job:{lost['job_id']}", because=because, **about)
    return True


def reopen(tx: Transaction, job_ids: Collection[int]) -> list[int]:
    """Reopen these jobs if they have no picture, and their unfinished descendants; return the reopened jobs.

    Pictures that were made from them before stay, because equal fingerprints are equal pixels.
    """
    opened: list[int] = []
    owners = select(job.c.campaign_id).where(job.c.id.in_(job_ids)).distinct().order_by(job.c.campaign_id)
    for campaign_id in tx.connection.execute(owners).scalars().all():
        lock_campaign(tx.connection, campaign_id)
        own = and_(image.c.job_id == job.c.id, image.c.fingerprint == job.c.fingerprint)
        lost = and_(job.c.id.in_(job_ids), job.c.status.in_(("succeeded", "leased")), ~exists().where(own))
        ids = _ids(tx.connection, select(job.c.id).where(job.c.campaign_id == campaign_id, lost))
        if not ids:
            continue
        below = descendants(ids)
        unfinished = and_(job.c.id.in_(select(below.c.id)), job.c.status.in_(("waiting", "ready", "leased")))
        ids = _ids(tx.connection, select(job.c.id).where(or_(job.c.id.in_(ids), unfinished)))
        job_control.reset(tx.connection, job.c.id.in_(ids), campaign_id=campaign_id)
        tx.record(Event.JOBS_REOPENED, f"campaign:{campaign_id}", jobs=ids)
        job_control.resolve_new_jobs(tx, campaign_id=campaign_id)
        opened += ids
    return opened


def record_quarantine(tx: Transaction, job_id: int, moved: Sequence[tuple[str, str]]) -> None:
    """Record quarantined objects before they are moved; one that was not moved is found again."""
    tx.record(Event.OBJECT_QUARANTINED, f"job:{job_id}", moved=[list(pair) for pair in moved])


def still_used(
    connection: Connection, keys: Collection[str], fingerprint: str, *, but_of: int | None = None
) -> frozenset[str]:
    """Return those of the keys that another job's picture, or a found picture without a job, still uses.

    Equal jobs share a folder.
    """
    recorded = select(image.c.key, image.c.sidecar_key).where(image.c.fingerprint == fingerprint)
    if but_of is not None:
        recorded = recorded.where(image.c.job_id != but_of)
    found = select(found_picture.c.key, found_picture.c.sidecar_key).where(found_picture.c.fingerprint == fingerprint)
    pairs = [*connection.execute(recorded), *connection.execute(found)]
    used = {key for pair in pairs for key in pair}
    control_maps = tuple(f"{key.rsplit('.', 1)[0]}.control-" for key, _ in pairs)
    return frozenset(key for key in keys if key in used or key.startswith(control_maps))


def _ids(connection: Connection, statement: Select[int]) -> list[int]:
    return list(connection.execute(statement.order_by(job.c.id)).scalars())
