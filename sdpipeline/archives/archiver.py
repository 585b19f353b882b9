"""Archiver: moves closed editions out of the tables, and applies retention and erasure to archives."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from sdpipeline.archives import contents as archived_editions
from sdpipeline.db import archives, retention
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import now_s
from sdpipeline.db.retention import DAY_S, Picture, Subject, stored_inputs
from sdpipeline.domain import Json
from sdpipeline.storage import ObjectStore
from sdpipeline.storage.contract import delete_all
from sdpipeline.storage.keys import input_key, picture_folder, stem

DROPPED = 1000
"""Jobs that one transaction deletes from the tables."""


def archive(
    audit: AuditLog, store: ObjectStore, seal: Callable[[], object], *, team: str, days: float, dry_run: bool = False
) -> int:
    """Archive the editions that closed at least ``days`` ago; return how many.

    Each archive is under a seal before its edition leaves the tables.
    """
    with audit.database.read() as connection:
        due = archives.closed(connection, team=team, days=days)
    if dry_run:
        return len(due)
    recorded = []
    for edition in due:
        with audit.database.snapshot() as connection:
            public, private = archived_editions.written(connection, edition)
        stored = archived_editions.store_edition(store, edition, public, private)
        with audit.transaction() as tx:
            if archives.record(tx, edition, stored):
                recorded.append(edition)
    if recorded:
        seal()  # once for all: if another process seals, this waits for its next seal
    for edition in recorded:
        _drop(audit, edition.campaign_id, edition.edition)
    return len(recorded)


def _drop(audit: AuditLog, campaign_id: int, edition: str) -> None:
    while True:
        with audit.database.write() as connection:
            if not archives.drop(connection, campaign_id, edition, limit=DROPPED):
                return


def take_up(audit: AuditLog, store: ObjectStore, seal: Callable[[], object], *, team: str) -> None:
    """Finish what a killed run began: delete rows of archived editions, and private objects that were replaced."""
    with audit.database.read() as connection:
        left, rows = archives.left_behind(connection, team=team), archives.archives(connection, team=team)
    if left:
        seal()  # that run may have ended before it
    for campaign_id, edition in left:
        _drop(audit, campaign_id, edition)
    for row in rows:
        _delete_left(audit, store, row)


def _delete_left(audit: AuditLog, store: ObjectStore, row: Json) -> None:
    if row["private_left"] is not None:
        store.delete(row["private_left"])
        with audit.database.write() as connection:
            archives.change(connection, row, private_left=None)


def delete_expired(
    audit: AuditLog,
    store: ObjectStore,
    *,
    team: str,
    pictures_days: float | None,
    prompts_days: float | None,
    dry_run: bool,
) -> tuple[int, int]:
    """Delete the pictures, then the private parts, of archived editions older than their period.

    Returns the number of pictures and of private parts.
    """
    with audit.database.read() as connection:
        rows, now = archives.archives(connection, team=team), archives.now(connection)
    pictures = prompts = 0
    for row in rows:
        age_days = (now - row["newest_at"]) / DAY_S
        if pictures_days is not None and age_days > pictures_days and row["pictures_deleted_at"] is None:
            due = [picture for job in archived_editions.jobs(store, row) for picture in _pictures(row, job)]
            pictures += len(due)
            if not dry_run:
                _delete_pictures(audit, store, row, due)
        if prompts_days is not None and age_days > prompts_days:
            lines = [line for line in archived_editions.private(store, row) if _kept(line) != line]
            prompts += len(lines)
            if lines and not dry_run:
                _delete_private(audit, store, row, {line["id"] for line in lines})
    return pictures, prompts


def _pictures(row: Json, job: Json) -> list[Picture]:
    """Return the pictures of an archived job that existed when it was archived."""
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
        shared = retention.keys_of_others(connection, {picture.fingerprint for picture in pictures}, ())
    for picture in pictures:
        if picture.key not in shared:
            delete_all(store, stem(picture.key))


def _delete_pictures(audit: AuditLog, store: ObjectStore, row: Json, pictures: Collection[Picture]) -> None:
    _delete_objects(audit, store, pictures)
    with audit.transaction() as tx:
        archives.change(tx.connection, row, pictures_deleted_at=now_s())
        retention.record_deletion(tx, pictures, because="retention")


def _kept(line: Json) -> Json | None:
    """Return a job's private line without its prompts, or None.

    A line with a subject and stored inputs is kept, because a later erasure finds the subject by it.
    """
    if line["subject"] is None or not stored_inputs(line["request"]):
        return None
    nothing: Json = {"row_key": "", "variables": {}, "axes": {}, "error": None, "salt": ""}
    nothing |= {"scores": {}} if "scores" in line else {}
    return line | nothing | {"request": retention.without_prompts(line["request"], line["salt"])}


def _delete_private(audit: AuditLog, store: ObjectStore, row: Json, job_ids: Collection[int]) -> None:
    erased = _commitments(store, row, job_ids)
    rest = [kept for line in archived_editions.private(store, row) if (kept := _kept(line)) is not None]
    left = archived_editions.store_private(store, row, rest) if rest else {"private_key": None, "private_sha256": None}
    left |= {"private_left": row["private_key"]}
    with audit.transaction() as tx:
        archives.change(tx.connection, row, **left)
        retention.record_erasure(tx, row["campaign_id"], erased, because="retention")
    _delete_left(audit, store, row | left)


def _commitments(store: ObjectStore, row: Json, job_ids: Collection[int]) -> dict[int, str]:
    return {job["id"]: job["commitment"] for job in archived_editions.jobs(store, row) if job["id"] in job_ids}


def find_private(audit: AuditLog, store: ObjectStore) -> None:
    """After a restore: adopt the private parts that storage has now, and record again what is missing from them."""
    with audit.database.read() as connection:
        rows = archives.archives(connection)
    for row in rows:
        if row["private_key"] is not None and store.head(row["private_key"]) is None:
            _find_private(audit, store, row)


def _find_private(audit: AuditLog, store: ObjectStore, row: Json) -> None:
    left = archived_editions.newest_private(store, row) | {"private_left": None}
    here = {line["id"] for line in archived_editions.private(store, row | left)}
    unlisted = [job for job in archived_editions.jobs(store, row) if job["id"] not in here and job["erased_at"] is None]
    pictures = [] if row["pictures_deleted_at"] else [each for job in unlisted for each in _pictures(row, job)]
    with audit.transaction() as tx:
        archives.change(tx.connection, row, **left)
        retention.record_deletion(tx, [each for each in pictures if store.head(each.key) is None], because="restore")
        if unlisted:
            commitments = {job["id"]: job["commitment"] for job in unlisted}
            retention.record_erasure(tx, row["campaign_id"], commitments, because="restore")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivedJobs:
    """Jobs of an archived edition that hold a subject's data, with their commitments.

    ``pictures`` and ``inputs`` are theirs; ``folders`` are those of their fingerprints.
    """

    row: Json
    jobs: dict[int, str]
    pictures: list[Picture]
    inputs: set[str]
    folders: dict[str, set[str]]


@dataclass(slots=True)
class Archived:
    """A subject's data in archives, and what archived jobs of others share with it.

    ``inputs_of_others`` are the inputs that others' jobs consume; ``keys_of_others`` their picture keys by fingerprint.
    """

    editions: list[ArchivedJobs] = field(default_factory=list)
    inputs_of_others: set[str] = field(default_factory=set)
    keys_of_others: dict[str, set[str]] = field(default_factory=dict)

    def shared(self, fingerprints: Collection[str]) -> set[str]:
        """Return the keys of others' archived pictures of these fingerprints."""
        return set[str]().union(*(self.keys_of_others.get(each, ()) for each in fingerprints))


def of_subject(audit: AuditLog, store: ObjectStore, name: str, *, team: str) -> Archived:
    """Search all archives of a team for a subject's data."""
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
        jobs, pictures, folders = dict[int, str](), list[Picture](), dict[str, set[str]]()
        for job in archived_editions.jobs(store, row):
            existing = [] if row["pictures_deleted_at"] else _pictures(row, job)
            if job["id"] in own:
                jobs[job["id"]] = job["commitment"]
                pictures += existing
                for each in {job["fingerprint"], *(picture["fingerprint"] for picture in job["images"])}:
                    folder = (
                        picture_folder(team=row["team"], campaign=row["name"], stage=job["stage"], fingerprint=each)
                        + "/"
                    )
                    folders.setdefault(each, set()).add(folder)
            else:
                for picture in existing:
                    found.keys_of_others.setdefault(picture.fingerprint, set()).add(picture.key)
        if own:
            found.editions.append(ArchivedJobs(row=row, jobs=jobs, pictures=pictures, inputs=inputs, folders=folders))
    return found


def erase(audit: AuditLog, store: ObjectStore, found: ArchivedJobs, subject: Subject, inputs: Collection[str]) -> int:
    """Erase a subject's archived jobs after their pictures were deleted; return the number of pictures.

    The private part is rewritten without these jobs.
    """
    row = found.row
    for digest in sorted(inputs):
        store.delete(input_key(digest))
    rest = (line for line in archived_editions.private(store, row) if line["id"] not in found.jobs)
    left = archived_editions.store_private(store, row, rest) | {"private_left": row["private_key"]}
    with audit.transaction() as tx:
        archives.change(tx.connection, row, **left)
        retention.record_deletion(tx, found.pictures, because="erasure")
        retention.record_erasure(tx, row["campaign_id"], found.jobs, because="erasure", subject=subject)
        if inputs:
            retention.record_input_deletion(tx, row["campaign_id"], inputs, subject)
    _delete_left(audit, store, row | left)
    return len(found.pictures)
