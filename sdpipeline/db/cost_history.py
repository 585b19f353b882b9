"""Average cost of this deployment's pictures, for estimates of the next ones."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, func, select

from sdpipeline.db.tables import spending, work_group


@dataclass(frozen=True, slots=True, kw_only=True)
class Usual:
    """Average cost of one picture, including failed attempts."""

    gpu_seconds: float
    size_bytes: float


def usual(connection: Connection, batch_key: str) -> Usual | None:
    """Return the average cost of pictures with this batch key in this deployment; None if there are none."""
    return average(connection, work_group.c.batch_key == batch_key)


def average(connection: Connection, groups: ColumnElement[bool]) -> Usual | None:
    """Return the average cost for any groups; reads one row per worker of theirs, not per picture."""
    sums = [func.sum(spending.c[name]).label(name) for name in ("images", "gpu_seconds", "size_bytes")]
    own = and_(spending.c.campaign_id == work_group.c.campaign_id, spending.c.group_id == work_group.c.id)
    row = connection.execute(select(*sums).select_from(work_group.join(spending, own)).where(groups)).one()
    if not row.images:
        return None
    images = float(row.images)
    return Usual(gpu_seconds=float(row.gpu_seconds) / images, size_bytes=float(row.size_bytes) / images)
