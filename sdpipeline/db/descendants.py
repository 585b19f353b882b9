"""Job dependencies: descendants of a job, children that become ready, and descendants that are skipped."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import CTE, Connection, Select, case, select, update

from sdpipeline.db.audit import Event, Transaction
from sdpipeline.db.connection import now_s
from sdpipeline.db.tables import READY, WAITING, job, job_parent

SKIPPED_COLUMNS: Mapping[str, Any] = {
    "finished_at": now_s(),
    "error_kind": "AncestorNotSucceeded",
    "error": "a parent of this job did not succeed; retry the parent",
}
"""Column values of a skipped job."""


def count_down_children(connection: Connection, parent_id: int) -> None:
    """Count down the open parents of a finished job's children; a child without open parents becomes ready."""
    children = (
        select(job.c.id)
        .join(job_parent, job_parent.c.job_id == job.c.id)
        .where(job_parent.c.parent_id == parent_id, job.c.status == WAITING, job.c.parents_left > 0)
        .order_by(job.c.id)
        .with_for_update(of=job)
        .cte("children")
    )
    connection.execute(
        update(job)
        .where(job.c.id.in_(select(children.c.id)))
        .values(
            parents_left=job.c.parents_left - 1,
            status=case((job.c.parents_left == 1, READY), else_=job.c.status),
        )
    )


def skip_descendants(tx: Transaction, of: Collection[int] | Select[int], subject: str) -> None:
    """Skip the descendants of failed jobs, because they can no longer be made."""
    below = descendants(of)
    stranded = (
        select(job.c.id)
        .where(job.c.id.in_(select(below.c.id)), job.c.status.in_(("waiting", "ready")))
        .order_by(job.c.id)
        .with_for_update()
        .cte("stranded")
    )
    skip = update(job).where(job.c.id.in_(select(stranded.c.id))).values(status="skipped", **SKIPPED_COLUMNS)
    rows = sorted(tx.connection.execute(skip.returning(job.c.id)).scalars())
    if rows:
        tx.record(Event.JOBS_SKIPPED, subject, jobs=rows)


def descendants(of: Collection[int] | Select[int]) -> CTE:
    """Build a recursive table of the ids of all descendants of the given jobs."""
    below = select(job_parent.c.job_id.label("id")).where(job_parent.c.parent_id.in_(of)).cte("below", recursive=True)
    deeper = select(job_parent.c.job_id).join(below, job_parent.c.parent_id == below.c.id)
    return below.union(deeper)
