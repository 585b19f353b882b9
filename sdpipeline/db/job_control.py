"""User control of jobs: retry, cancel, pause and resume; and the initial status of new jobs."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import ColumnElement, Connection, and_, case, exists, false, func, null, or_, select, update

from sdpipeline.db import budgets, registry
from sdpipeline.db.audit import Event, Transaction
from sdpipeline.db.connection import now_s
from sdpipeline.db.descendants import SKIPPED_COLUMNS, descendants, skip_descendants
from sdpipeline.db.locks import lock_campaign
from sdpipeline.db.queue import abandon_campaign_attempts
from sdpipeline.db.staging import POLICY
from sdpipeline.db.tables import LEASED, READY, WAITING, archive, campaign, image, job, job_parent
from sdpipeline.errors import BadInputError, Mistake

_REOPENABLE = ("failed", "blocked", "skipped", "cancelled")


def retry(tx: Transaction, *, campaign_id: int, statuses: Collection[str]) -> int:
    """Reopen jobs that ended in one of the given statuses, and the skipped descendants of reopened jobs.

    Jobs that a policy forbids are left alone, because only a submit checks prompts and policies again. Returns how many
    jobs of the given statuses were reopened; raises BadInputError for a status that cannot be retried.
    """
    if wrong := sorted(set(statuses) - set(_REOPENABLE)):
        fix = f"one of {', '.join(_REOPENABLE)}"
        raise BadInputError(Mistake(key="status", message=f"{', '.join(wrong)} cannot be retried", fix=fix))
    lock_campaign(tx.connection, campaign_id)
    mine = and_(job.c.campaign_id == campaign_id, job.c.status.in_(list(statuses)))
    # Erased jobs cannot be made again; rows of an archived edition are about to be deleted.
    archived = exists().where(archive.c.campaign_id == job.c.campaign_id, archive.c.edition == job.c.edition)
    changeable = and_(job.c.erased_at.is_(None), ~archived)
    chosen = and_(mine, changeable, job.c.error_kind.is_distinct_from(POLICY))
    below = descendants(select(job.c.id).where(chosen))
    lost = and_(job.c.id.in_(select(below.c.id)), changeable, job.c.status == "skipped")
    skipped = reset(tx.connection, lost, campaign_id=campaign_id)
    ended = reset(tx.connection, chosen, campaign_id=campaign_id)
    if not skipped and not ended:
        return 0
    tx.record(
        Event.JOBS_RETRIED, f"campaign:{campaign_id}", jobs=sorted(skipped + ended), statuses=sorted(set(statuses))
    )
    resolve_new_jobs(tx, campaign_id=campaign_id)
    return len(ended) + (len(skipped) if "skipped" in statuses else 0)


def forbidden(connection: Connection, *, campaign_id: int, status: str) -> int:
    """Count jobs of a status that a retry leaves alone because a policy forbids them."""
    mine = and_(job.c.campaign_id == campaign_id, job.c.status == status, job.c.error_kind == POLICY)
    return int(connection.execute(select(func.count()).where(mine)).scalar_one())


def reset(connection: Connection, chosen: ColumnElement[bool], *, campaign_id: int) -> list[int]:
    """Reset jobs to no attempts, no error and status ``new`` until :func:`resolve_new_jobs`; return their ids.

    A worker that holds one of them loses its lease.
    """
    start = {
        "status": "new",
        "attempt": 0,
        "alone": false(),
        "lease_id": null(),
        "not_before": null(),
        "error_kind": null(),
        "error": null(),
        "finished_at": null(),
    }
    ids = list(connection.execute(update(job).where(chosen).values(**start).returning(job.c.id)).scalars())
    if ids:
        abandon_campaign_attempts(connection, campaign_id)
    return ids


def resolve_new_jobs(tx: Transaction, *, campaign_id: int) -> None:
    """Give every ``new`` job of a campaign its status: succeeded, ready, waiting, skipped or blocked.

    An existing picture for the same fingerprint is kept. Stages are resolved in order, because a job's status depends
    on its parents'. The caller holds the campaign's lock.
    """
    parent = job.alias("parent")
    of_this = (
        select(func.count())
        .select_from(job_parent.join(parent, parent.c.id == job_parent.c.parent_id))
        .where(job_parent.c.job_id == job.c.id)
        .correlate(job)
    )
    unfinished = of_this.where(parent.c.status != "succeeded").scalar_subquery()
    dead = of_this.where(parent.c.status.in_(_REOPENABLE)).scalar_subquery()
    is_new = and_(job.c.campaign_id == campaign_id, job.c.status == "new")
    depths = tx.connection.execute(select(job.c.depth).where(is_new).distinct().order_by(job.c.depth)).scalars().all()
    budgets.start_over(tx.connection, campaign_id)
    skipped: list[int] = []
    blocked: list[int] = []
    for depth in depths:
        here = and_(is_new, job.c.depth == depth)
        kept = update(job).where(here, image.c.job_id == job.c.id, image.c.fingerprint == job.c.fingerprint)
        own = {"attempt": image.c.attempt, "finished_at": image.c.created_at}
        tx.connection.execute(kept.values(status="succeeded", parents_left=0, **own))
        blocked += registry.block(tx.connection, here)
        lost = update(job).where(here, dead > 0).values(status="skipped", **SKIPPED_COLUMNS).returning(job.c.id)
        skipped += tx.connection.execute(lost).scalars()
        held = and_(job.c.chain.is_not(None), job.c.depth == 0)
        status = case((unfinished > 0, "waiting"), (held, "waiting"), else_="ready")
        tx.connection.execute(update(job).where(here).values(parents_left=unfinished, status=status))
    if blocked:
        tx.record(Event.JOBS_BLOCKED, f"campaign:{campaign_id}", jobs=sorted(blocked), rule=registry.REVOKED)
    if skipped:
        tx.record(Event.JOBS_SKIPPED, f"campaign:{campaign_id}", jobs=sorted(skipped))
        dead_ends = and_(job.c.campaign_id == campaign_id, job.c.status == "skipped")
        skip_descendants(tx, select(job.c.id).where(dead_ends), f"campaign:{campaign_id}")


def cancel(tx: Transaction, *, campaign_id: int, chosen: ColumnElement[bool] | None = None) -> int:
    """Cancel unfinished jobs (or ``chosen``); a worker that holds one loses its lease."""
    lock_campaign(tx.connection, campaign_id)
    unfinished = or_(job.c.status == WAITING, job.c.status == READY, job.c.status == LEASED)
    mine = and_(job.c.campaign_id == campaign_id, chosen if chosen is not None else unfinished)
    ended = {"status": "cancelled", "lease_id": null(), "not_before": null(), "finished_at": now_s()}
    rows = list(tx.connection.execute(update(job).where(mine).values(**ended).returning(job.c.id)).scalars())
    if rows:
        abandon_campaign_attempts(tx.connection, campaign_id)
        tx.record(Event.JOBS_CANCELLED, f"campaign:{campaign_id}", jobs=sorted(rows))
    return len(rows)


def set_campaign_status(tx: Transaction, *, campaign_id: int, status: str) -> None:
    """Pause or resume a campaign: workers lease nothing from one that is not active."""
    own = {"status": status, "paused_because": null()}
    tx.connection.execute(update(campaign).where(campaign.c.id == campaign_id).values(**own))
    event = Event.CAMPAIGN_PAUSED if status == "paused" else Event.CAMPAIGN_RESUMED
    tx.record(event, f"campaign:{campaign_id}")
