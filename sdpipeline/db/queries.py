"""Read-only queries for status, jobs, show, progress and the reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, case, exists, func, select

from sdpipeline.db import budgets
from sdpipeline.db.connection import now_s
from sdpipeline.db.tables import (
    attempt,
    audit_event,
    campaign,
    campaign_version,
    checkpoint,
    group_checkpoint,
    image,
    job,
    job_parent,
    lease,
    work_group,
    worker,
)
from sdpipeline.domain import Json, Status

LOST_AFTER_S = 60.0
LOST_SHOWN_S = 24 * 3600.0

_UNFINISHED = ("waiting", "ready", "leased")
_OWN_IMAGE = and_(image.c.job_id == job.c.id, image.c.fingerprint == job.c.fingerprint)
_PICTURE = (image.c.url, image.c.sha256, image.c.size_bytes, image.c.width, image.c.height, image.c.scores)
_ABOUT = (image.c.reused_from, image.c.deleted_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Progress of a campaign; ``status`` is active, paused or finished."""

    id: int
    name: str
    version: int
    status: str
    counts: dict[str, int]
    images: int
    gpu_seconds: float
    cost: float
    budget: Json | None
    paused_because: str | None

    def __getattr__(self, name: str) -> int:
        """Return the count of a status, as in ``progress.succeeded``."""
        if name in Status._value2member_map_:
            return self.counts.get(name, 0)
        raise AttributeError(name)

    @property
    def total(self) -> int:
        """All jobs except cancelled ones."""
        return sum(self.counts.values()) - self.counts.get("cancelled", 0)

    @property
    def remaining(self) -> int:
        """Jobs that are not terminal yet."""
        return sum(self.counts.get(name, 0) for name in _UNFINISHED)

    @property
    def finished(self) -> int:
        """Jobs that are terminal."""
        return self.total - self.remaining

    def document(self) -> Json:
        """Return the document of ``status --json``."""
        jobs = {"total": self.total} | {str(s): self.counts.get(s, 0) for s in Status}
        own = {"name": self.name, "version": self.version, "status": self.status}
        spent = {"images": self.images, "gpu_seconds": round(self.gpu_seconds, 3), "cost": round(self.cost, 4)}
        return own | {"jobs": jobs} | spent | {"budget": self.budget, "paused_because": self.paused_because}


def campaign_id(connection: Connection, *, team: str, name: str) -> int | None:
    """Return the campaign's id, or None."""
    found = select(campaign.c.id).where(campaign.c.team == team, campaign.c.name == name)
    return connection.execute(found).scalar()


def campaign_names(connection: Connection, *, team: str) -> list[str]:
    """List all campaigns of a team, oldest first."""
    names = select(campaign.c.name).where(campaign.c.team == team).order_by(campaign.c.id)
    return list(connection.execute(names).scalars())


def progress(connection: Connection, campaign_id: int) -> Progress:
    """Return counts by status, pictures, GPU-seconds (including failed attempts) and cost of one campaign."""
    about = connection.execute(
        select(
            campaign.c.name,
            campaign.c.status,
            campaign.c.budget,
            campaign.c.paused_because,
            func.coalesce(campaign_version.c.number, 0).label("version"),
        )
        .outerjoin(campaign_version, campaign_version.c.id == campaign.c.version_id)
        .where(campaign.c.id == campaign_id)
    ).one()
    counted = select(job.c.status, func.count()).where(job.c.campaign_id == campaign_id).group_by(job.c.status)
    counts = {str(status): int(count) for status, count in connection.execute(counted)}
    spent = budgets.spent(connection, campaign_id)
    unfinished = any(counts.get(name) for name in _UNFINISHED)
    status = about.status if unfinished or about.status != "active" else "finished"
    return Progress(
        id=campaign_id,
        name=about.name,
        version=about.version,
        status=status,
        counts=counts,
        # Each succeeded job has exactly one picture; counting pictures would read an equally long table.
        images=counts.get("succeeded", 0),
        gpu_seconds=spent["gpu_seconds"],
        cost=spent["cost"],
        budget=about.budget,
        paused_because=about.paused_because,
    )


def unfinished_editions(connection: Connection, campaign_id: int) -> set[str]:
    """List editions with unfinished jobs."""
    mine = (job.c.campaign_id == campaign_id, job.c.status.in_(_UNFINISHED))
    return set(connection.execute(select(job.c.edition).where(*mine).distinct()).scalars())


def has_edition(connection: Connection, campaign_id: int, edition: str) -> bool:
    """Return True if that edition was submitted before."""
    mine = (job.c.campaign_id == campaign_id, job.c.edition == edition)
    return connection.execute(select(job.c.id).where(*mine).limit(1)).first() is not None


def work_left(connection: Connection, campaign_id: int | None) -> bool:
    """Return True if any worker may still lease a job of an active campaign."""
    unfinished = and_(job.c.campaign_id == campaign.c.id, job.c.status.in_(_UNFINISHED))
    active = select(campaign.c.id).where(campaign.c.status == "active", exists().where(unfinished))
    if campaign_id is not None:
        active = active.where(campaign.c.id == campaign_id)
    return connection.execute(active.limit(1)).first() is not None


def jobs(
    connection: Connection,
    campaign_id: int,
    *,
    status: str | None = None,
    made_with: str | None = None,
    after: int = 0,
    limit: int | None = None,
) -> Iterator[Json]:
    """Yield jobs in order of their id, as ``jobs --json`` shows them."""
    statement = (
        select(job, *_PICTURE, *_ABOUT)
        .outerjoin(image, _OWN_IMAGE)
        .where(job.c.campaign_id == campaign_id, job.c.id > after)
        .order_by(job.c.id)
        .limit(limit)
    )
    if status is not None:
        statement = statement.where(job.c.status == status)
    if made_with is not None:
        with_it = select(group_checkpoint.c.group_id).where(group_checkpoint.c.digest.startswith(made_with))
        statement = statement.where(job.c.group_id.in_(with_it))
    for chunk in connection.execute(statement.execution_options(yield_per=500)).partitions():
        parents = _parents(connection, [row.id for row in chunk])
        for row in chunk:
            yield _job_document(row, parents.get(row.id, []))


def _parents(connection: Connection, job_ids: list[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    pairs = select(job_parent).where(job_parent.c.job_id.in_(job_ids)).order_by(job_parent.c.parent_id)
    for row in connection.execute(pairs):
        found.setdefault(row.job_id, []).append(row.parent_id)
    return found


def _job_document(row: Any, parents: list[int]) -> Json:
    picture = {column.name: getattr(row, column.name) for column in _PICTURE}
    # While a job is being made again, its older picture does not count.
    has_picture = row.url is not None and row.status == "succeeded"
    return {
        "id": row.id,
        "stage": row.stage,
        "edition": row.edition,
        "row": row.row_key,
        "variables": row.variables,
        "seed": row.seed,
        "parents": parents,
        "status": row.status,
        "fingerprint": row.fingerprint,
        "attempts": row.attempt,
        "error": row.error,
        "erased_at": row.erased_at,
        "image": picture if has_picture and row.deleted_at is None else None,
        "image_deleted_at": row.deleted_at if has_picture else None,
        "reused_from": row.reused_from if has_picture else None,
    }


def show(connection: Connection, job_id: int, *, team: str) -> Json | None:
    """Return everything known about one of the team's jobs; None for any other."""
    row = connection.execute(
        select(job, *_PICTURE, *_ABOUT, campaign.c.team, campaign.c.name)
        .join(campaign, campaign.c.id == job.c.campaign_id)
        .outerjoin(image, _OWN_IMAGE)
        .where(job.c.id == job_id, campaign.c.team == team)
    ).first()
    if row is None:
        return None
    document = _job_document(row, _parents(connection, [job_id]).get(job_id, []))
    tries = connection.execute(select(attempt).where(attempt.c.job_id == job_id).order_by(attempt.c.started_at))
    pictures = connection.execute(select(image).where(image.c.job_id == job_id)).mappings()
    children = select(job_parent.c.job_id).where(job_parent.c.parent_id == job_id).order_by(job_parent.c.job_id)
    happened = select(audit_event.c.body).where(audit_event.c.subject == f"job:{job_id}")
    return document | {
        "team": row.team,
        "campaign": row.name,
        "edition": row.edition,
        "identity": row.identity,
        "request": row.request,
        "error_kind": row.error_kind,
        "not_before": row.not_before,
        "erased": row.erased_at is not None,
        "children": list(connection.execute(children).scalars()),
        "history": [dict(one) for one in tries.mappings()],
        "pictures": [dict(one) for one in pictures],
        "events": list(connection.execute(happened).scalars()),
    }


def failures(connection: Connection, campaign_id: int, limit: int) -> list[Json]:
    """List the first failed and then blocked jobs with their reasons.

    Jobs with a subject are left out, because Prefect keeps everything that it shows.
    """
    unsuccessful = (job.c.status.in_(("failed", "blocked")), job.c.subject.is_(None))
    statement = (
        select(
            job.c.id.label("job_id"),
            job.c.status,
            job.c.stage,
            job.c.row_key.label("row"),
            job.c.variables,
            job.c.seed,
            job.c.attempt.label("attempts"),
            job.c.error_kind.label("kind"),
            job.c.error,
        )
        .where(job.c.campaign_id == campaign_id, *unsuccessful)
        .order_by(job.c.status.desc(), job.c.id)
        .limit(limit)
    )
    return [dict(row) for row in connection.execute(statement).mappings()]


def newest_images(connection: Connection, campaign_id: int, limit: int, *, without_subject: bool = False) -> list[Json]:
    """List the newest finished pictures, deepest stages first."""
    statement = (
        select(
            job.c.id,
            job.c.stage,
            job.c.row_key.label("row"),
            job.c.variables,
            job.c.seed,
            image.c.key,
            image.c.url,
        )
        .join(image, _OWN_IMAGE)
        .where(job.c.campaign_id == campaign_id, job.c.status == "succeeded", image.c.deleted_at.is_(None))
        .order_by(job.c.depth.desc(), image.c.created_at.desc())
        .limit(limit)
    )
    if without_subject:
        statement = statement.where(job.c.subject.is_(None))
    return [dict(row) for row in connection.execute(statement).mappings()]


def stages(connection: Connection, campaign_id: int) -> list[Json]:
    """List jobs, pictures and GPU-seconds per stage, in the chain's order."""
    finished = case((job.c.status == "succeeded", 1), else_=0)
    statement = (
        select(
            job.c.stage,
            func.min(job.c.depth).label("depth"),
            func.count().label("jobs"),
            func.sum(finished).label("succeeded"),
            func.coalesce(func.sum(image.c.gpu_seconds), 0.0).label("gpu_seconds"),
        )
        .select_from(job.outerjoin(image, and_(_OWN_IMAGE, job.c.status == "succeeded")))
        .where(job.c.campaign_id == campaign_id, job.c.status != "cancelled")
        .group_by(job.c.stage)
        .order_by(func.min(job.c.depth), job.c.stage)
    )
    return [dict(row) for row in connection.execute(statement).mappings()]


def timings(connection: Connection, campaign_id: int) -> Iterator[Json]:
    """Yield the measured seconds of every picture."""
    statement = select(image.c.timings).join(job, _OWN_IMAGE).where(job.c.campaign_id == campaign_id)
    yield from connection.execute(statement.execution_options(yield_per=1000)).scalars()


def checkpoints_of(connection: Connection, campaign_id: int) -> list[str]:
    """List aliases of the base checkpoints that a campaign's jobs use, by name."""
    used = select(work_group.c.checkpoint_digest).where(work_group.c.campaign_id == campaign_id)
    aliases = select(checkpoint.c.alias).where(checkpoint.c.digest.in_(used)).distinct().order_by(checkpoint.c.alias)
    return list(connection.execute(aliases).scalars())


def live_workers(connection: Connection, *, lost_after_s: float = LOST_AFTER_S) -> list[Json]:
    """List workers that did not stop in order, with status and open leases.

    The status is ``working``, ``paused`` (by the worker itself) or ``lost``. A lost worker has sent no heartbeat for
    ``lost_after_s``, and its leases expired: it was killed, is frozen, or cannot reach the database. Workers lost more
    than a day ago are left out.
    """
    held = select(func.count()).where(lease.c.worker_id == worker.c.id, lease.c.closed_at.is_(None)).correlate(worker)
    alive = exists().where(lease.c.worker_id == worker.c.id, lease.c.closed_at.is_(None), lease.c.expires_at >= now_s())
    # The worker's own lease time may be longer than the caller's.
    lost = and_(worker.c.seen_at < now_s() - lost_after_s, ~alive)
    status = case((lost, "lost"), (worker.c.paused_at.is_not(None), "paused"), else_="working").label("status")
    lost_since = case((lost, worker.c.seen_at)).label("lost_since")
    recent = worker.c.seen_at >= now_s() - LOST_SHOWN_S
    columns = (worker, status, lost_since, held.scalar_subquery().label("leases"))
    statement = select(*columns).where(worker.c.stopped_at.is_(None), recent).order_by(worker.c.started_at)
    return [dict(row) for row in connection.execute(statement).mappings()]


def worker_ids_of(connection: Connection, *, host: str, pid: int) -> list[str]:
    """List workers that run as this process and have not stopped in order."""
    mine = (worker.c.host == host, worker.c.pid == pid, worker.c.stopped_at.is_(None))
    return list(connection.execute(select(worker.c.id).where(*mine)).scalars())
