"""Queries for picture exports: pages of jobs with their pictures, and the variables for file names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, and_, func, select

from sdpipeline.db.tables import campaign, campaign_version, image, job, job_parent
from sdpipeline.domain import Json

PAGE = 500
"""Jobs per page; each page is read in its own transaction, so that none stays open while files are copied."""


def stages(connection: Connection, campaign_id: int) -> list[str]:
    """List the stages that have jobs, in the chain's order."""
    stages = select(job.c.stage).where(*_not_cancelled(campaign_id)).group_by(job.c.stage)
    return list(connection.execute(stages.order_by(func.min(job.c.depth), job.c.stage)).scalars())


def last_stages(connection: Connection, campaign_id: int) -> list[str]:
    """List the stages whose pictures no other job consumes."""
    child = job.alias("child")
    consumed = (
        select(job.c.stage)
        .join(job_parent, job_parent.c.parent_id == job.c.id)
        .join(child, child.c.id == job_parent.c.job_id)
        .where(*_not_cancelled(campaign_id), child.c.status != "cancelled")
        .distinct()
    )
    inner = set(connection.execute(consumed).scalars())
    return [stage for stage in stages(connection, campaign_id) if stage not in inner]


def editions(connection: Connection, campaign_id: int) -> list[str]:
    """List the campaign's editions by name; the one without a name is the campaign itself."""
    editions = select(job.c.edition).where(*_not_cancelled(campaign_id)).distinct().order_by(job.c.edition)
    return list(connection.execute(editions).scalars())


def source(connection: Connection, campaign_id: int) -> str:
    """Return the text of the published version of the campaign's file."""
    newest = select(campaign_version.c.source).join(campaign, campaign.c.version_id == campaign_version.c.id)
    return str(connection.execute(newest.where(campaign.c.id == campaign_id)).scalar() or "")


def bounds(connection: Connection, campaign_id: int) -> tuple[int, int]:
    """Return the first and last id of the campaign's jobs, so that pages can skip all others."""
    ids = select(func.min(job.c.id), func.max(job.c.id)).where(job.c.campaign_id == campaign_id)
    first, last = connection.execute(ids).one()
    return int(first or 0), int(last or 0)


def page(
    connection: Connection, campaign_id: int, *, stages: Sequence[str], edition: str | None, after: int, last: int
) -> Sequence[Any]:
    """Return the next jobs in order of their id, each with its picture if it has one."""
    columns = ("id", "stage", "row_key", "seed", "edition", "axes", "variables", "request")
    pictures = ("key", "url", "sha256", "size_bytes", "width", "height")
    own = and_(image.c.job_id == job.c.id, image.c.fingerprint == job.c.fingerprint, job.c.status == "succeeded")
    own = and_(own, image.c.deleted_at.is_(None))
    statement = (
        select(*(job.c[name] for name in columns), *(image.c[name] for name in pictures))
        .outerjoin(image, own)
        # An index on the campaign would sort all its jobs for every page; `+ 0` keeps the order of ids.
        .where(job.c.campaign_id + 0 == campaign_id, job.c.status != "cancelled")
        .where(job.c.stage.in_(stages), job.c.id > after, job.c.id <= last)
        .order_by(job.c.id)
        .limit(PAGE)
    )
    if edition is not None:
        statement = statement.where(job.c.edition == edition)
    return connection.execute(statement).all()


def inherited(connection: Connection, job_ids: Sequence[int]) -> dict[int, Json]:
    """Return the variables of each job's ancestors, nearest first, so that later stages can use them in names."""
    found: dict[int, Json] = {each: {} for each in job_ids}
    below = {each: {each} for each in job_ids}
    while below:
        above: dict[int, set[int]] = {}
        pairs = (
            select(job_parent.c.job_id, job.c.id, job.c.variables)
            .join(job, job.c.id == job_parent.c.parent_id)
            .where(job_parent.c.job_id.in_(list(below)))
        )
        for pair in connection.execute(pairs):
            for each in below[pair.job_id]:
                found[each] = pair.variables | found[each]
                above.setdefault(pair.id, set()).add(each)
        below = above
    return found


def _not_cancelled(campaign_id: int) -> tuple[Any, ...]:
    return (job.c.campaign_id == campaign_id, job.c.status != "cancelled")
