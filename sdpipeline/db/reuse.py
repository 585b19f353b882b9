"""Pictures that jobs of the same fingerprint may be delivered from, so that they cost nothing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, select

from sdpipeline.db.queue import StoredImage
from sdpipeline.db.tables import campaign, image, job

_STORED = tuple(StoredImage.__dataclass_fields__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """A picture that was made, and the job it was made for; never itself a copy."""

    job_id: int
    stored: StoredImage


def newest(connection: Connection, *, team: str, fingerprints: Collection[str]) -> dict[str, Original]:
    """For each fingerprint the team's newest picture of it, where there is one; its bytes are still to be checked."""
    columns = (image.c.fingerprint, image.c.job_id, *(image.c[name] for name in _STORED))
    statement = _made(columns, team, fingerprints).order_by(image.c.created_at, image.c.job_id)
    return {
        row["fingerprint"]: Original(job_id=row["job_id"], stored=StoredImage(**{name: row[name] for name in _STORED}))
        for row in connection.execute(statement).mappings()
    }


def known(connection: Connection, *, team: str, fingerprints: Collection[str]) -> frozenset[str]:
    """Which of these fingerprints the team has a picture of; a thousand at a time, or so."""
    statement = _made((image.c.fingerprint,), team, fingerprints).distinct()
    return frozenset(connection.execute(statement).scalars())


def _made(columns: Collection[Any], team: str, fingerprints: Collection[str]) -> Select[Any]:
    """Every picture row stands for a picture that was stored, read back and told to the audit log."""
    # Not a join: SQLite would begin it at the team and read all of its jobs. And a copy keeps its maker's record: what
    # holds one person's data is never delivered to another's job.
    owner = select(campaign.c.team).join(job, job.c.campaign_id == campaign.c.id)
    owner = owner.where(job.c.id == image.c.job_id, job.c.subject.is_(None))
    made = (image.c.fingerprint.in_(fingerprints), image.c.reused_from.is_(None), image.c.deleted_at.is_(None))
    return select(*columns).where(*made, owner.scalar_subquery() == team)
