"""Retention: delete pictures and prompts after a set time, and archive closed editions.

Each deletion leaves a trace in the audit log. Objects are deleted first; one transaction then writes the tombstones and
their event. After a kill between the two, the next run finishes: an object that is missing counts as deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from sdpipeline.archives import archiver
from sdpipeline.db import retention
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.retention import Picture
from sdpipeline.domain import Json
from sdpipeline.storage import ObjectStore
from sdpipeline.storage.contract import delete_all
from sdpipeline.storage.keys import stem

BATCH = 200
"""Pictures or jobs in one transaction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Periods:
    """Retention periods in days; None means forever."""

    pictures_days: float | None = None
    prompts_days: float | None = None
    editions_days: float | None = None


@dataclass(slots=True)
class RetentionResult:
    """Counts of what was deleted, or would be in a dry run."""

    pictures: int = 0
    prompts: int = 0
    sources: int = 0
    editions: int = 0

    def document(self) -> Json:
        """Return the document that ``retention --json`` prints."""
        return {name: getattr(self, name) for name in ("pictures", "prompts", "sources", "editions")}


def delete_expired(
    audit: AuditLog,
    store: ObjectStore,
    seal: Callable[[], object],
    *,
    team: str,
    periods: Periods,
    dry_run: bool = False,
) -> RetentionResult:
    """Delete what is older than its period, and archive closed editions.

    The order is: pictures, then the prompts of jobs that have no pictures left, then closed editions. An edition leaves
    the tables once its archive is under a seal.
    """
    done = RetentionResult()
    if not dry_run:
        archiver.take_up(audit, store, seal, team=team)
    if periods.pictures_days is not None:
        for pictures in _old_pictures(audit, team, periods.pictures_days):
            done.pictures += len(pictures) if dry_run else _delete_pictures(audit, store, pictures)
    if periods.prompts_days is not None:
        for job_ids in _old_jobs(audit, team, periods.prompts_days, with_pictures=dry_run):
            done.prompts += len(job_ids) if dry_run else _erase_prompts(audit, job_ids)
        if not dry_run:
            with audit.transaction() as tx:
                done.sources = retention.drop_old_sources(tx, team=team, days=periods.prompts_days)
    days = {"pictures_days": periods.pictures_days, "prompts_days": periods.prompts_days}
    in_archives = archiver.delete_expired(audit, store, team=team, **days, dry_run=dry_run)
    done.pictures += in_archives[0]
    done.prompts += in_archives[1]
    if periods.editions_days is not None:
        done.editions = archiver.archive(audit, store, seal, team=team, days=periods.editions_days, dry_run=dry_run)
    return done


def _old_pictures(audit: AuditLog, team: str, days: float) -> Iterator[list[Picture]]:
    after = (0, "")
    while True:
        with audit.database.read() as connection:
            found = retention.old_pictures(connection, team=team, days=days, after=after, limit=BATCH)
        if not found:
            return
        yield found
        after = (found[-1].job_id, found[-1].fingerprint)


def _delete_pictures(audit: AuditLog, store: ObjectStore, pictures: Sequence[Picture]) -> int:
    with audit.database.read() as connection:
        owners = {picture.job_id for picture in pictures}
        shared = retention.keys_of_others(connection, {picture.fingerprint for picture in pictures}, owners)
    for picture in pictures:
        if picture.key not in shared:
            delete_all(store, stem(picture.key))
    with audit.transaction() as tx:
        return retention.mark_deleted(tx, pictures, because="retention")


def _old_jobs(audit: AuditLog, team: str, days: float, *, with_pictures: bool) -> Iterator[list[int]]:
    after = 0
    while True:
        with audit.database.read() as connection:
            found = retention.old_jobs(
                connection, team=team, days=days, after=after, limit=BATCH, with_pictures=with_pictures
            )
        if not found:
            return
        yield found
        after = found[-1]


def _erase_prompts(audit: AuditLog, job_ids: Collection[int]) -> int:
    with audit.transaction() as tx:
        return retention.erase_prompts(tx, job_ids, because="retention")
