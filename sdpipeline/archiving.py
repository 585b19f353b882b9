"""Taking closed editions out of the tables, and forgetting in them what is forgotten elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from sdpipeline import archive as archived_editions
from sdpipeline.db import archives, forgetting
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import now_s
from sdpipeline.db.forgetting import DAY_S, Picture, Subject, stored_inputs
from sdpipeline.delivery import delete_all, stem
from sdpipeline.domain import Json
from sdpipeline.inputs import input_key
from sdpipeline.storage import ObjectStore

DROPPED = 1000
"""Jobs that one transaction takes out of the tables."""


def archive(
    audit: AuditLog, store: ObjectStore, seal: Callable[[], object], *, team: str, days: float, dry_run: bool = False
) -> int:
    """Archive the editions that closed that long ago, each sealed before it leaves the tables; returns how many."""
    with audit.database.read() as connection:
        due = archives.closed(connection, team=team, days=days)
    if dry_run:
        return len(due)
    done = 0
    for edition in due:
        with audit.database.snapshot() as connection:
            public, private = archived_editions.written(connection, edition)
        stored = archived_editions.store_edition(store, edition, public, private)
        with audit.transaction() as tx:
            recorded = archives.record(tx, edition, stored)
        if recorded:
            seal()
            _drop(audit, edition.campaign_id, edition.edition)
            done += 1
    return done


def _drop(audit: AuditLog, campaign_id: int, edition: str) -> None:
    while True:
        with audit.database.write() as connection:
            if not archives.drop(connection, campaign_id, edition, limit=DROPPED):
                return


def take_up(audit: AuditLog, store: ObjectStore, *, team: str) -> None:
    """Finish what a killed run began: rows of archived editions, and private objects that were replaced."""
    with audit.database.read() as connection:
        left, rows = archives.left_behind(connection, team=team), archives.archives(connection, team=team)
    for campaign_id, edition in left:
        _drop(audit, campaign_id, edition)
    for row in rows:
        _delete_left(audit, store, row)


def _delete_left(audit: AuditLog, store: ObjectStore, row: Json) -> None:
    if row["private_left"] is not None:
        store.delete(row["private_left"])
        with audit.database.write() as connection:
            archives.change(connection, row, private_left=None)


def forget(
    audit: AuditLog,
    store: ObjectStore,
    *,
    team: str,
    pictures_days: float | None,
    prompts_days: float | None,
    dry_run: bool,
) -> tuple[int, int]:
    """Delete the pictures, then the private parts, of archived editions that are that old; returns how many of each."""
    with audit.database.read() as connection:
        rows, now = archives.archives(connection, team=team), archives.now(connection)
    pictures = prompts = 0
    for row in rows:
        age_days = (now - row["newest_at"]) / DAY_S
        if pictures_days is not None and age_days > pictures_days and row["pictures_deleted_at"] is None:
            gone = [picture for job in archived_editions.jobs(store, row) for picture in _pictures(row, job)]
            pictures += len(gone)
            if not dry_run:
                _delete_pictures(audit, store, row, gone)
        if prompts_days is not None and age_days > prompts_days and row["private_key"] is not None:
            prompts += sum(1 for _ in archived_editions.private(store, row))
            if not dry_run:
                _delete_private(audit, store, row)
    return pictures, prompts


def _pictures(row: Json, job: Json) -> list[Picture]:
    """The pictures of an archived job that were there when it was archived."""
    return [
        Picture(
            campaign_id=row["campaign_id"],
            job_id=job["id"],
            fingerprint=each["fingerprint"],
            sha256=each["sha256"],
            key=each["key"],
        )
        for each in job["images"]
        if each["deleted_at"] is None
    ]


def _delete_objects(audit: AuditLog, store: ObjectStore, pictures: Collection[Picture]) -> None:
    with audit.database.read() as connection:
        shared = forgetting.keys_of_others(connection, {picture.fingerprint for picture in pictures}, ())
    for picture in pictures:
        if picture.key not in shared:
            delete_all(store, stem(picture.key))


def _delete_pictures(audit: AuditLog, store: ObjectStore, row: Json, pictures: Collection[Picture]) -> None:
    _delete_objects(audit, store, pictures)
    with audit.transaction() as tx:
        archives.change(tx.connection, row, pictures_deleted_at=now_s())
        forgetting.tell_deleted(tx, pictures, because="retention")


def _delete_private(audit: AuditLog, store: ObjectStore, row: Json) -> None:
    erased = _commitments(store, row, {line["id"] for line in archived_editions.private(store, row)})
    with audit.transaction() as tx:
        left = {"private_key": None, "private_sha256": None, "private_left": row["private_key"]}
        archives.change(tx.connection, row, **left)
        forgetting.tell_erased(tx, row["campaign_id"], erased, because="retention")
    _delete_left(audit, store, row | left)


def _commitments(store: ObjectStore, row: Json, job_ids: Collection[int]) -> dict[int, str]:
    return {job["id"]: job["commitment"] for job in archived_editions.jobs(store, row) if job["id"] in job_ids}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivedJobs:
    """The jobs of an archived edition that hold a subject's data, with their commitments; their pictures and inputs."""

    row: Json
    jobs: dict[int, str]
    pictures: list[Picture]
    inputs: set[str]


@dataclass(slots=True)
class Archived:
    """What archives hold of a subject, and the inputs that others' archived jobs consume."""

    editions: list[ArchivedJobs] = field(default_factory=list)
    inputs_of_others: set[str] = field(default_factory=set)


def of_subject(audit: AuditLog, store: ObjectStore, name: str, *, team: str) -> Archived:
    """Look through all archives of a team."""
    found = Archived()
    with audit.database.read() as connection:
        rows = archives.archives(connection, team=team)
    for row in rows:
        own, inputs = set[int](), set[str]()
        for line in archived_editions.private(store, row):
            if line["subject"] == name:
                own.add(line["id"])
                inputs |= stored_inputs(line["request"])
            else:
                found.inputs_of_others |= stored_inputs(line["request"])
        if own:
            mine = [job for job in archived_editions.jobs(store, row) if job["id"] in own]
            pictures = [] if row["pictures_deleted_at"] else [each for job in mine for each in _pictures(row, job)]
            jobs = {job["id"]: job["commitment"] for job in mine}
            found.editions.append(ArchivedJobs(row=row, jobs=jobs, pictures=pictures, inputs=inputs))
    return found


def erase(audit: AuditLog, store: ObjectStore, found: ArchivedJobs, subject: Subject, inputs: Collection[str]) -> int:
    """Erase them there: the private part is written again without them. Returns how many pictures were deleted."""
    row = found.row
    _delete_objects(audit, store, found.pictures)
    for digest in sorted(inputs):
        store.delete(input_key(digest))
    rest = (line for line in archived_editions.private(store, row) if line["id"] not in found.jobs)
    left = archived_editions.store_private(store, row, rest) | {"private_left": row["private_key"]}
    with audit.transaction() as tx:
        archives.change(tx.connection, row, **left)
        forgetting.tell_deleted(tx, found.pictures, because="erasure")
        forgetting.tell_erased(tx, row["campaign_id"], found.jobs, because="erasure", subject=subject)
        if inputs:
            forgetting.tell_inputs(tx, row["campaign_id"], inputs, subject)
    _delete_left(audit, store, row | left)
    return len(found.pictures)
