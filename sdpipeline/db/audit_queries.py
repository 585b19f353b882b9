"""Queries for audit verification: current rows of jobs, pictures and published versions."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, and_, exists, or_, select

from sdpipeline.db.submit import jobs_root
from sdpipeline.db.tables import attempt, campaign, campaign_version, checkpoint, image, job, spending
from sdpipeline.domain import Json

_JOB = ("id", "edition", "stage", "row_key", "axes", "seed", "identity", "fingerprint", "request", "salt", "status")


def jobs(connection: Connection) -> Iterator[Json]:
    """Yield every job row, in order of its id."""
    columns = [job.c[name] for name in (*_JOB, "attempt", "erased_at")]
    statement = select(*columns).order_by(job.c.id).execution_options(yield_per=1000)
    for row in connection.execute(statement).mappings():
        yield dict(row)


def published_roots(connection: Connection) -> Iterator[tuple[int, str]]:
    """Yield each campaign's current version and the Merkle root over that version's jobs."""
    versions = select(campaign.c.version_id).where(campaign.c.version_id.is_not(None)).order_by(campaign.c.id)
    for version_id in connection.execute(versions).scalars().all():
        yield version_id, jobs_root(connection, version_id)


def images(connection: Connection) -> Iterator[Json]:
    """Yield every picture row, oldest first."""
    statement = select(image).order_by(image.c.created_at, image.c.job_id).execution_options(yield_per=1000)
    for row in connection.execute(statement).mappings():
        yield dict(row)


def image_keys(connection: Connection) -> list[tuple[int, str]]:
    """List (job id, fingerprint) of every picture."""
    return [(job_id, fp) for job_id, fp in connection.execute(select(image.c.job_id, image.c.fingerprint))]


def jobs_with(connection: Connection, sha256: str) -> list[int]:
    """List the jobs that have a picture of these bytes, including deleted pictures."""
    statement = select(image.c.job_id).where(image.c.sha256 == sha256).order_by(image.c.job_id)
    return list(connection.execute(statement).scalars())


def digest_at(connection: Connection, place: str, *, team: str) -> str | None:
    """Return the SHA-256 of the team's picture with that key or URL."""
    by_place = select(image.c.sha256).where(or_(image.c.key == place, image.c.url == place))
    return connection.execute(by_place.where(image.c.key.startswith(f"{team}/")).limit(1)).scalar_one_or_none()


def succeeded_without_image(connection: Connection) -> list[int]:
    """List jobs whose status is succeeded and that have no picture."""
    own = and_(image.c.job_id == job.c.id, image.c.fingerprint == job.c.fingerprint)
    statement = select(job.c.id).where(job.c.status == "succeeded", ~exists().where(own)).order_by(job.c.id)
    return list(connection.execute(statement).scalars())


def campaigns(connection: Connection) -> list[Json]:
    """List every campaign row."""
    return [dict(row) for row in connection.execute(select(campaign).order_by(campaign.c.id)).mappings()]


def versions(connection: Connection) -> Iterator[Json]:
    """Yield every version row with the text of its campaign file, fetched a few rows at a time."""
    statement = select(campaign_version).order_by(campaign_version.c.id).execution_options(yield_per=10)
    for row in connection.execute(statement).mappings():
        yield dict(row)


def checkpoints(connection: Connection) -> list[Json]:
    """List every checkpoint row, without its manifest."""
    columns = [column for column in checkpoint.columns if column.name != "manifest"]
    rows = connection.execute(select(*columns).order_by(checkpoint.c.digest, checkpoint.c.alias)).mappings()
    return [dict(row) for row in rows]


def spent(connection: Connection) -> Iterator[Json]:
    """Yield every row of the cost of attempts."""
    statement = select(spending).order_by(spending.c.campaign_id, spending.c.group_id, spending.c.worker_id)
    for row in connection.execute(statement.execution_options(yield_per=1000)).mappings():
        yield dict(row)


def ended_attempts(connection: Connection) -> Iterator[Json]:
    """Yield every attempt that made a picture or failed, with its cost."""
    columns = (attempt.c.job_id, attempt.c.lease_id, attempt.c.number, attempt.c.gpu_seconds, attempt.c.cost)
    statement = select(*columns).where(attempt.c.outcome.in_(("succeeded", "failed")))
    for row in connection.execute(statement.execution_options(yield_per=1000)).mappings():
        yield dict(row)
