"""Who may change one campaign's jobs at a time, so that transitions neither deadlock nor miss one another.

Workers' transitions share a campaign: each locks its own leased jobs first and what is below them in
order of id, so they cannot deadlock among themselves. What people do (submit, retry, cancel) touches
many jobs and reads their parents' statuses; it has the campaign alone, and a child that is published
while its parent finishes is counted by one of the two. SQLite has one writer anyway.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, Integer, cast, func, select

from sdpipeline.db.tables import job

_CAMPAIGN = 0x5344
"""The class of our advisory locks; the object is the campaign's id."""


def lock_campaign(connection: Connection, campaign_id: int) -> None:
    """Wait for the transitions under way in this campaign, and keep others out until the commit."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_CAMPAIGN, campaign_id)))


def have_campaigns(connection: Connection, of_jobs: ColumnElement[bool]) -> None:
    """As :func:`have_campaign`, for the campaigns of these jobs, in one order for everybody."""
    _lock_owners(connection, of_jobs, func.pg_advisory_xact_lock)


def share_campaigns(connection: Connection, of_jobs: ColumnElement[bool]) -> None:
    """Keep :func:`have_campaign` out of the campaigns of these jobs until the commit."""
    _lock_owners(connection, of_jobs, func.pg_advisory_xact_lock_shared)


def share_if_free(connection: Connection, campaign_id: int) -> bool:
    """Keep :func:`have_campaign` out of this campaign until the commit, unless somebody has it or waits for it."""
    if connection.dialect.name != "postgresql":
        return True
    return bool(connection.execute(select(func.pg_try_advisory_xact_lock_shared(_CAMPAIGN, campaign_id))).scalar_one())


def _lock_owners(connection: Connection, of_jobs: ColumnElement[bool], lock: Any) -> None:
    if connection.dialect.name == "postgresql":
        owners = select(job.c.campaign_id).where(of_jobs).distinct().order_by(job.c.campaign_id).subquery()
        connection.execute(select(lock(_CAMPAIGN, cast(owners.c.campaign_id, Integer))))
