"""What pictures took in this deployment, from which the next ones are estimated."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, and_, func, select

from sdpipeline.db.tables import image, job, work_group

NEWEST = 200
"""How many of a batch key's newest pictures tell what the next will take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usual:
    """What one picture took, on average."""

    gpu_seconds: float
    size_bytes: float


def usual(connection: Connection, batch_key: str) -> Usual | None:
    """What the newest pictures of this batch key took in this deployment; None where there are none."""
    newest = (
        select(image.c.gpu_seconds, image.c.size_bytes)
        .join(job, and_(job.c.id == image.c.job_id, job.c.fingerprint == image.c.fingerprint))
        .join(work_group, work_group.c.id == job.c.group_id)
        .where(work_group.c.batch_key == batch_key, image.c.reused_from.is_(None))
        .order_by(image.c.created_at.desc())
        .limit(NEWEST)
        .subquery()
    )
    row = connection.execute(select(func.avg(newest.c.gpu_seconds), func.avg(newest.c.size_bytes))).one()
    return None if row[0] is None else Usual(gpu_seconds=float(row[0]), size_bytes=float(row[1]))
