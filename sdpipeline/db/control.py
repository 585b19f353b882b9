"""What people do to jobs: retry, cancel, pause and resume; and the status a job starts with."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import ColumnElement, Connection, and_, case, exists, func, literal_column, null, or_, select, update

from sdpipeline.db.audit import Event, Transaction
from sdpipeline.db.connection import now_s
from sdpipeline.db.queue import LEASED, READY, SKIPPED, WAITING, descendants
from sdpipeline.db.tables import campaign, image, job, job_parent

_DEAD_ENDS = ("failed", "blocked", "skipped", "cancelled")


def retry(tx: Transaction, *, campaign_id: int, statuses: Collection[str]) -> int:
    """Reopen jobs of the given terminal statuses, and the skipped descendants of what is reopened."""
    chosen = select(job.c.id).where(job.c.campaign_id == campaign_id, job.c.status.in_(list(statuses)))
    ids = list(tx.connection.execute(chosen).scalars())
    if not ids:
        return 0
    below = descendants(ids)
    skipped = list(
        tx.connection.execute(
            select(job.c.id).where(job.c.id.in_(select(below.c.id)), job.c.status == "skipped")
        ).scalars()
    )
    reopened = sorted({*ids, *skipped})
    reset(tx.connection, job.c.id.in_(reopened))
    settle(tx, campaign_id=campaign_id)
    tx.record(Event.JOBS_RETRIED, f"campaign:{campaign_id}", jobs=reopened, statuses=sorted(statuses))
    return len(ids)


def reset(connection: Connection, chosen: ColumnElement[bool]) -> None:
    """Back to the start: no attempts, no error, status ``new`` until :func:`settle` decides."""
    connection.execute(
        update(job)
        .where(chosen)
        .values(
            status="new",
            attempt=0,
            alone=literal_column("false"),
            lease_id=null(),
            not_before=null(),
            error_kind=null(),
            error=null(),
            finished_at=null(),
        )
    )


def settle(tx: Transaction, *, campaign_id: int) -> None:
    """Give every ``new`` job of a campaign its status: succeeded, ready, waiting or skipped.

    A picture that was already made for the same fingerprint is kept. Stage by stage, because a
    job's status depends on its parents'.
    """
    parent = job.alias("parent")
    of_this = (
        select(func.count())
        .select_from(job_parent.join(parent, parent.c.id == job_parent.c.parent_id))
        .where(job_parent.c.job_id == job.c.id)
        .correlate(job)
    )
    unfinished = of_this.where(parent.c.status != "succeeded").scalar_subquery()
    dead = of_this.where(parent.c.status.in_(_DEAD_ENDS)).scalar_subquery()
    made = exists().where(image.c.job_id == job.c.id, image.c.fingerprint == job.c.fingerprint)
    status = case((made, "succeeded"), (unfinished > 0, "waiting"), else_="ready")
    is_new = and_(job.c.campaign_id == campaign_id, job.c.status == "new")
    depths = tx.connection.execute(select(job.c.depth).where(is_new).distinct().order_by(job.c.depth)).scalars().all()
    skipped: list[int] = []
    for depth in depths:
        here = and_(is_new, job.c.depth == depth)
        lost = update(job).where(here, dead > 0, ~made).values(status="skipped", **SKIPPED).returning(job.c.id)
        skipped += tx.connection.execute(lost).scalars()
        tx.connection.execute(update(job).where(here).values(parents_left=unfinished, status=status))
    if skipped:
        tx.record(Event.JOBS_SKIPPED, f"campaign:{campaign_id}", jobs=sorted(skipped))


def cancel(tx: Transaction, *, campaign_id: int, chosen: ColumnElement[bool] | None = None) -> int:
    """Cancel what is not terminal yet (or ``chosen``); a worker that has it will find its lease gone."""
    unfinished = or_(job.c.status == WAITING, job.c.status == READY, job.c.status == LEASED)
    rows = list(
        tx.connection.execute(
            update(job)
            .where(job.c.campaign_id == campaign_id, chosen if chosen is not None else unfinished)
            .values(status="cancelled", lease_id=null(), not_before=null(), finished_at=now_s())
            .returning(job.c.id)
        ).scalars()
    )
    if rows:
        tx.record(Event.JOBS_CANCELLED, f"campaign:{campaign_id}", jobs=sorted(rows))
    return len(rows)


def set_campaign_status(tx: Transaction, *, campaign_id: int, status: str) -> None:
    """Pause or resume: workers lease nothing from a campaign that is not active."""
    tx.connection.execute(update(campaign).where(campaign.c.id == campaign_id).values(status=status))
    event = Event.CAMPAIGN_PAUSED if status == "paused" else Event.CAMPAIGN_RESUMED
    tx.record(event, f"campaign:{campaign_id}")
