"""Restore of pictures that storage has and no row names: kept until their job exists, then recorded as its picture."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, delete, exists, func, insert, or_, select, update

from sdpipeline.db import budgets, job_control, similar_images
from sdpipeline.db.audit import Event, Transaction
from sdpipeline.db.budgets import Charge
from sdpipeline.db.connection import insert_ignoring, now_s
from sdpipeline.db.descendants import descendants
from sdpipeline.db.locks import lock_campaign
from sdpipeline.db.queue import audited_fields, commitment
from sdpipeline.db.tables import LEASED, campaign, found_picture, image, job
from sdpipeline.domain import Json
from sdpipeline.jobs import StoredImage

MAX_CLAIMED = 1000
_STORED = tuple(StoredImage.__dataclass_fields__)
_HAS_ONE = exists().where(image.c.job_id == job.c.id, image.c.fingerprint == job.c.fingerprint)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundPicture:
    """A picture with its sidecar, checked byte by byte, and the job that the sidecar names."""

    team: str
    campaign: str
    stage: str
    fingerprint: str
    identity_start: str
    stored: StoredImage
    attempt: int
    worker_id: str
    made_at: str


def unknown(connection: Connection, sidecars: Sequence[tuple[str, str]]) -> list[str]:
    """Return the keys of those (key, fingerprint) sidecars that no row names; pass about a thousand at a time."""
    fingerprints = {fingerprint for _, fingerprint in sidecars}
    recorded = select(image.c.sidecar_key).where(image.c.fingerprint.in_(fingerprints))
    waiting = select(found_picture.c.sidecar_key).where(found_picture.c.sidecar_key.in_([key for key, _ in sidecars]))
    known = {*connection.execute(recorded).scalars(), *connection.execute(waiting).scalars()}
    return [key for key, _ in sidecars if key not in known]


def remember(connection: Connection, found: Sequence[FoundPicture]) -> None:
    """Keep pictures for their jobs."""
    own = ("team", "campaign", "stage", "fingerprint", "identity_start", "attempt", "worker_id", "made_at")
    rows = [
        {name: getattr(each, name) for name in own}
        | {"sidecar_key": each.stored.sidecar_key, "key": each.stored.key, "stored": _fields(each.stored)}
        for each in found
    ]
    if rows:
        connection.execute(insert_ignoring(connection, found_picture), rows)


def mark_consumed(connection: Connection, keys: Sequence[str]) -> None:
    """Mark these pictures as inputs of other pictures."""
    connection.execute(update(found_picture).where(found_picture.c.key.in_(keys)).values(consumed=True))


def campaigns_found(connection: Connection) -> list[int]:
    """List the known campaigns whose pictures were found."""
    mine = and_(found_picture.c.team == campaign.c.team, found_picture.c.campaign == campaign.c.name)
    return list(connection.execute(select(campaign.c.id).where(exists().where(mine)).order_by(campaign.c.id)).scalars())


def waiting(connection: Connection) -> int:
    """Count the found pictures that have no job yet."""
    return int(connection.execute(select(func.count()).select_from(found_picture)).scalar_one())


def claim(tx: Transaction, *, campaign_id: int) -> int:
    """Record the found pictures of a campaign's jobs as theirs, so that the jobs succeed and their children continue.

    Jobs that are leased, cancelled, blocked or erased are left as they are. Returns how many were adopted.
    """
    count = 0
    if campaign_id not in campaigns_found(tx.connection):
        return count
    if tx.connection.execute(_matching(campaign_id).limit(1)).first():
        lock_campaign(tx.connection, campaign_id)
    while rows := tx.connection.execute(_matching(campaign_id).limit(MAX_CLAIMED)).all():
        first = {row.job_id: row for row in reversed(rows)}
        for job_id in sorted(first):
            _adopt(tx, campaign_id, first[job_id])
        _resolve_adopted(tx, campaign_id, sorted(first))
        keys = [row.sidecar_key for row in rows]
        tx.connection.execute(delete(found_picture).where(found_picture.c.sidecar_key.in_(keys)))
        count += len(first)
    tx.connection.execute(delete(found_picture).where(_not_wanted(campaign_id)))
    return count


def _its() -> Any:
    """Return the join condition between a found picture and the job that its sidecar names."""
    f = found_picture.c
    return and_(
        f.team == campaign.c.team,
        f.campaign == campaign.c.name,
        f.stage == job.c.stage,
        f.fingerprint == job.c.fingerprint,
        f.identity_start == func.substr(job.c.identity, 1, 16),
    )


def _not_wanted(campaign_id: int) -> Any:
    """Match found pictures of jobs that have one or were erased: they are orphans like any other."""
    matching = select(job.c.id).select_from(campaign.join(job, job.c.campaign_id == campaign.c.id))
    matching = matching.where(campaign.c.id == campaign_id, _its(), or_(_HAS_ONE, job.c.erased_at.is_not(None)))
    return matching.correlate(found_picture).exists()


def _matching(campaign_id: int) -> Any:
    """Select jobs without a picture together with their found pictures, best first."""
    f = found_picture.c
    found = (f.sidecar_key, f.stored, f.attempt, f.worker_id)
    columns = (job.c.group_id, job.c.identity, job.c.salt, job.c.request, job.c.subject, *found)
    return (
        select(job.c.id.label("job_id"), job.c.fingerprint, *columns)
        .select_from(campaign)
        .join(job, job.c.campaign_id == campaign.c.id)
        .join(found_picture, _its())
        .where(campaign.c.id == campaign_id, job.c.status.not_in(("cancelled", "blocked")), job.c.status != LEASED)
        .where(~_HAS_ONE, job.c.erased_at.is_(None))
        .order_by(job.c.id, f.consumed.desc(), f.made_at.desc(), f.sidecar_key)
    )


def _adopt(tx: Transaction, campaign_id: int, row: Any) -> None:
    """Insert the same row and event as for a completed picture, under the event name of an adoption."""
    stored = StoredImage(**row.stored)
    about = {"attempt": row.attempt, "fingerprint": row.fingerprint}
    values = about | {"job_id": row.job_id, "worker_id": row.worker_id, "created_at": now_s()} | _fields(stored)
    values |= similar_images.looks(stored.scores) if stored.reused_from is None else {}
    tx.connection.execute(insert(image).values(**values))
    spent = None
    if stored.reused_from is None:
        charge = Charge(worker_id=row.worker_id, gpu_seconds=stored.gpu_seconds)
        spent = budgets.spend(tx.connection, campaign_id, row.group_id, charge, size_bytes=stored.size_bytes)
    tx.record(
        Event.JOB_ADOPTED,
        f"job:{row.job_id}",
        identity=row.identity,
        commitment=commitment(row.salt, row.request),
        worker=row.worker_id,
        image=audited_fields(_fields(stored), row.subject),
        spent=spent,
        **about,
    )


def _resolve_adopted(tx: Transaction, campaign_id: int, adopted: Collection[int]) -> None:
    """Mark the adopted jobs as succeeded, and resolve their unfinished descendants again."""
    below = descendants(adopted)
    unfinished = and_(job.c.id.in_(select(below.c.id)), job.c.status.in_(("waiting", "ready", "skipped")))
    others = and_(unfinished, job.c.id.not_in(adopted), job.c.erased_at.is_(None))
    reopened = list(tx.connection.execute(select(job.c.id).where(others).order_by(job.c.id)).scalars())
    if reopened:
        tx.record(Event.JOBS_REOPENED, f"campaign:{campaign_id}", jobs=reopened)
    both = or_(job.c.id.in_(adopted), job.c.id.in_(reopened))
    job_control.reset(tx.connection, both, campaign_id=campaign_id)
    job_control.resolve_new_jobs(tx, campaign_id=campaign_id)


def _fields(stored: StoredImage) -> Json:
    return {name: getattr(stored, name) for name in _STORED}
