"""Campaign locks: shared for workers' transitions, exclusive for submit, retry and cancel.

They prevent deadlocks and missed updates between transitions. Workers' transitions share a campaign. Each locks its own
leased jobs first and then their descendants in order of id, so they cannot deadlock among themselves. Commands (submit,
retry, cancel) touch many jobs and read their parents' statuses, so they lock the campaign exclusively. If a child is
published while its parent finishes, one of the two transactions counts it. SQLite has only one writer anyway.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, Integer, cast, func, select

from sdpipeline.db.tables import job

_CAMPAIGN = 0x5344
"""The class of our advisory locks; the object is the campaign's id."""


def lock_campaign(connection: Connection, campaign_id: int) -> None:
    """Wait for running transitions of this campaign, and keep others out until the commit."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_CAMPAIGN, campaign_id)))


def lock_campaigns(connection: Connection, of_jobs: ColumnElement[bool]) -> None:
    """Lock the campaigns of these jobs as :func:`lock_campaign` does, in one order for all callers."""
    _lock_owners(connection, of_jobs, func.pg_advisory_xact_lock)


def share_campaigns(connection: Connection, of_jobs: ColumnElement[bool]) -> None:
    """Keep :func:`lock_campaign` out of the campaigns of these jobs until the commit."""
    _lock_owners(connection, of_jobs, func.pg_advisory_xact_lock_shared)


def share_if_free(connection: Connection, campaign_id: int) -> bool:
    """Keep :func:`lock_campaign` out of this campaign until the commit; False if it is held or awaited."""
    if connection.dialect.name != "postgresql":
        return True
    return bool(connection.execute(select(func.pg_try_advisory_xact_lock_shared(_CAMPAIGN, campaign_id))).scalar_one())


def _lock_owners(connection: Connection, of_jobs: ColumnElement[bool], lock: Any) -> None:
    if connection.dialect.name == "postgresql":
        owners = select(job.c.campaign_id).where(of_jobs).distinct().order_by(job.c.campaign_id).subquery()
        connection.execute(select(lock(_CAMPAIGN, cast(owners.c.campaign_id, Integer))))
