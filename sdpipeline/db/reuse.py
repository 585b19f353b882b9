"""Reuse of existing pictures for jobs of the same fingerprint, at no GPU cost."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, select

from sdpipeline.db.tables import campaign, image, job
from sdpipeline.jobs import StoredImage

_STORED = tuple(StoredImage.__dataclass_fields__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """A generated picture and the job that it was made for; never itself a copy."""

    job_id: int
    stored: StoredImage


def newest(connection: Connection, *, team: str, fingerprints: Collection[str]) -> dict[str, Original]:
    """Return the team's newest picture of each fingerprint that has one; its bytes must still be checked."""
    columns = (image.c.fingerprint, image.c.job_id, *(image.c[name] for name in _STORED))
    statement = _made(columns, team, fingerprints).order_by(image.c.created_at, image.c.job_id)
    return {
        row["fingerprint"]: Original(job_id=row["job_id"], stored=StoredImage(**{name: row[name] for name in _STORED}))
        for row in connection.execute(statement).mappings()
    }


def known(connection: Connection, *, team: str, fingerprints: Collection[str]) -> frozenset[str]:
    """Return those of the fingerprints that the team has a picture of; pass about a thousand at a time."""
    statement = _made((image.c.fingerprint,), team, fingerprints).distinct()
    return frozenset(connection.execute(statement).scalars())


def _made(columns: Collection[Any], team: str, fingerprints: Collection[str]) -> Select[Any]:
    """Select original pictures; each row stands for one that was stored, read back and recorded in the audit log."""
    # Not a join: SQLite would begin it at the team and read all of its jobs. Pictures with a subject are left out: a
    # copy keeps its maker's record, and one person's data is never delivered to another's job.
    owner = select(campaign.c.team).join(job, job.c.campaign_id == campaign.c.id)
    owner = owner.where(job.c.id == image.c.job_id, job.c.subject.is_(None))
    made = (image.c.fingerprint.in_(fingerprints), image.c.reused_from.is_(None), image.c.deleted_at.is_(None))
    return select(*columns).where(*made, owner.scalar_subquery() == team)
