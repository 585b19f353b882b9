"""Retention and erasure: rows that are due for deletion, and their tombstones with audit events."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Text,
    and_,
    bindparam,
    cast,
    exists,
    func,
    null,
    or_,
    select,
    true,
    tuple_,
    update,
)

from sdpipeline.db import job_control
from sdpipeline.db.audit import Event, Transaction
from sdpipeline.db.connection import now_s
from sdpipeline.db.queue import commitment
from sdpipeline.db.tables import LOOKS, attempt, campaign, campaign_version, image, job, job_parent
from sdpipeline.domain import Json, request_from_document
from sdpipeline.storage.keys import picture_folder

ERASED = "erased"
"""Key of the commitment in an erased request; the rest of the request was deleted."""

DAY_S = 86_400
UNFINISHED = ("waiting", "ready", "leased")
_PRIVATE = ("prompt", "negative_prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture to delete from storage."""

    campaign_id: int
    job_id: int
    fingerprint: str
    sha256: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The person whose data is erased; the audit log names them by a salted hash.

    Only the receipt holds the salt.
    """

    name: str
    salt: str

    @property
    def commitment(self) -> str:
        """The salted hash; the holder of the receipt can show that it is this subject."""
        return commitment(self.salt, {"subject": self.name})


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A job that holds a subject's data, with the location of its pictures and its inputs."""

    id: int
    campaign_id: int
    team: str
    campaign: str
    stage: str
    fingerprint: str
    inputs: frozenset[str]

    def folder(self, fingerprint: str) -> str:
        """Return the folder of that fingerprint's pictures, with everything that attempts left there."""
        return picture_folder(team=self.team, campaign=self.campaign, stage=self.stage, fingerprint=fingerprint) + "/"


def old_pictures(
    connection: Connection, *, team: str, days: float, after: tuple[int, str], limit: int
) -> list[Picture]:
    """List the next pictures older than ``days``, in key order; skip those that unfinished jobs need."""
    child = job.alias("child")
    needed = exists().where(
        job_parent.c.parent_id == image.c.job_id, child.c.id == job_parent.c.job_id, child.c.status.in_(UNFINISHED)
    )
    old = image.c.created_at < now_s() - days * DAY_S
    beyond = tuple_(image.c.job_id, image.c.fingerprint) > tuple_(*after)
    statement = _pictures(campaign.c.team == team, beyond, old, image.c.deleted_at.is_(None), ~needed)
    return _read(connection, statement.order_by(image.c.job_id, image.c.fingerprint).limit(limit))


def pictures_of(connection: Connection, job_ids: Collection[int]) -> list[Picture]:
    """List every picture of these jobs that is not deleted yet."""
    return _read(connection, _pictures(image.c.job_id.in_(job_ids), image.c.deleted_at.is_(None)))


def _pictures(*which: ColumnElement[bool]) -> Select[Any]:
    columns = (job.c.campaign_id, image.c.job_id, image.c.fingerprint, image.c.sha256, image.c.key)
    owner = campaign.join(job, job.c.campaign_id == campaign.c.id).join(image, image.c.job_id == job.c.id)
    return select(*columns).select_from(owner).where(*which)


def _read(connection: Connection, statement: Select[Any]) -> list[Picture]:
    return [Picture(**row) for row in connection.execute(statement).mappings()]


def keys_of_others(connection: Connection, fingerprints: Collection[str], but: Collection[int]) -> set[str]:
    """Return keys of existing pictures of these fingerprints that other jobs have."""
    existing = select(image.c.key).where(image.c.fingerprint.in_(fingerprints), image.c.deleted_at.is_(None))
    return set(connection.execute(existing.where(image.c.job_id.not_in(but))).scalars())


def mark_deleted(tx: Transaction, pictures: Collection[Picture], *, because: str) -> int:
    """Leave a tombstone for each picture that has none; return the number of new ones."""
    rows = {(picture.job_id, picture.fingerprint): picture for picture in pictures}
    if not rows:
        return 0
    these = and_(tuple_(image.c.job_id, image.c.fingerprint).in_(list(rows)), image.c.deleted_at.is_(None))
    mark = update(image).where(these).values(deleted_at=now_s()).returning(image.c.job_id, image.c.fingerprint)
    marked = [rows[job_id, fingerprint] for job_id, fingerprint in tx.connection.execute(mark)]
    record_deletion(tx, marked, because=because)
    return len(marked)


def record_deletion(tx: Transaction, pictures: Collection[Picture], *, because: str) -> None:
    """Record an audit event for pictures that were deleted from storage."""
    for campaign_id in sorted({picture.campaign_id for picture in pictures}):
        own = [[each.job_id, each.fingerprint, each.sha256] for each in pictures if each.campaign_id == campaign_id]
        tx.record(Event.PICTURES_DELETED, f"campaign:{campaign_id}", pictures=sorted(own), because=because)


def old_jobs(
    connection: Connection, *, team: str, days: float, after: int, limit: int, with_pictures: bool = False
) -> list[int]:
    """List ended jobs older than ``days`` that have their request but no pictures any more, by id.

    ``with_pictures`` includes jobs whose pictures are due to be deleted first.
    """
    has_picture = exists().where(image.c.job_id == job.c.id, image.c.deleted_at.is_(None))
    ready = true() if with_pictures else ~has_picture
    old = func.coalesce(job.c.finished_at, job.c.created_at) < now_s() - days * DAY_S
    statement = (
        select(job.c.id)
        .join(campaign, campaign.c.id == job.c.campaign_id)
        .where(campaign.c.team == team, job.c.id > after, job.c.status.not_in(UNFINISHED))
        .where(job.c.erased_at.is_(None), old, ready)
        .order_by(job.c.id)
        .limit(limit)
    )
    return list(connection.execute(statement).scalars())


def erase_prompts(tx: Transaction, job_ids: Collection[int], *, because: str) -> int:
    """Erase prompts and salts of ended jobs; the commitment in the audit log takes the prompts' place."""
    here = and_(job.c.id.in_(job_ids), job.c.erased_at.is_(None))
    rows = _ended(tx.connection, here)
    changed = [{"row": row.id, "left": without_prompts(row.request, row.salt)} for row in rows]
    return _erase(tx, rows, changed, because=because, subject=None)


def erase_subject(tx: Transaction, job_ids: Collection[int], subject: Subject) -> int:
    """Erase all data of the subject from its ended jobs.

    That is requests, variables, row keys, errors and salts, and the scores and hashes of its pictures.
    """
    rows = _ended(tx.connection, and_(job.c.id.in_(job_ids), job.c.subject == subject.name))
    changed = [{"row": row.id, "left": {ERASED: committed(row.request, row.salt)}} for row in rows]
    nothing = {"variables": {}, "axes": {}, "row_key": "", "error": null()}
    done = _erase(tx, rows, changed, because="erasure", subject=subject, **nothing)
    own, unseen = [row.id for row in rows], dict.fromkeys(LOOKS, null())
    tx.connection.execute(update(attempt).where(attempt.c.job_id.in_(own)).values(error=null()))
    tx.connection.execute(update(image).where(image.c.job_id.in_(own)).values(scores={}, **unseen))
    return done


def _ended(connection: Connection, which: ColumnElement[bool]) -> Sequence[Any]:
    columns = (job.c.id, job.c.campaign_id, job.c.request, job.c.salt)
    ended = select(*columns).where(which, job.c.status.not_in(UNFINISHED)).order_by(job.c.id)
    return connection.execute(ended.with_for_update()).all()


def committed(request: Json, salt: str) -> str:
    """Return the commitment of a request in the audit log; an erased request holds nothing else of it."""
    return str(request[ERASED]) if ERASED in request else commitment(salt, request)


def without_prompts(request: Json, salt: str) -> Json:
    """Return a request without its prompts, with its commitment."""
    left = {name: value for name, value in request.items() if name not in _PRIVATE}
    return left | {ERASED: committed(request, salt)}


def _erase(
    tx: Transaction,
    rows: Sequence[Any],
    changed: list[Json],
    *,
    because: str,
    subject: Subject | None,
    **values: Any,
) -> int:
    if not rows:
        return 0
    left = {"request": bindparam("left", type_=job.c.request.type)} | ({"subject": null()} if subject else {})
    erased = {"salt": "", "erased_at": func.coalesce(job.c.erased_at, now_s())}
    erase = update(job).where(job.c.id == bindparam("row")).values(**left, **erased, **values)
    tx.connection.execute(erase, changed)
    for campaign_id in sorted({row.campaign_id for row in rows}):
        own = {row.id: committed(row.request, row.salt) for row in rows if row.campaign_id == campaign_id}
        record_erasure(tx, campaign_id, own, because=because, subject=subject)
    return len(rows)


def record_erasure(
    tx: Transaction, campaign_id: int, jobs: Mapping[int, str], *, because: str, subject: Subject | None = None
) -> None:
    """Record an audit event for erased requests, each with its earlier commitment."""
    about = {"subject_commitment": subject.commitment} if subject else {}
    erased = [[job_id, what] for job_id, what in sorted(jobs.items())]
    tx.record(Event.JOBS_ERASED, f"campaign:{campaign_id}", jobs=erased, because=because, **about)


def record_input_deletion(tx: Transaction, campaign_id: int, digests: Collection[str], subject: Subject) -> None:
    """Record that these outside pictures were deleted; the receipt's holder can show which they were."""
    commitments = sorted(commitment(subject.salt, {"input": digest}) for digest in digests)
    tx.record(Event.INPUTS_DELETED, f"campaign:{campaign_id}", inputs=commitments, because="erasure")


def drop_old_sources(tx: Transaction, *, team: str, days: float) -> int:
    """Erase old campaign files, which hold prompts too; return their number.

    Files of versions with unerased jobs, and of the current version, are kept.
    """
    has_requests = exists().where(
        job.c.campaign_id == campaign_version.c.campaign_id,
        job.c.version_id == campaign_version.c.id,
        job.c.erased_at.is_(None),
    )
    present = exists().where(campaign.c.version_id == campaign_version.c.id)
    mine = campaign_version.c.campaign_id.in_(select(campaign.c.id).where(campaign.c.team == team))
    old = and_(mine, campaign_version.c.created_at < now_s() - days * DAY_S, ~has_requests, ~present)
    return _drop_sources(tx, old)


def drop_sources_naming(tx: Transaction, subject: Subject, campaign_ids: Collection[int]) -> int:
    """Erase the campaign files that name the subject; return their number."""
    named = campaign_version.c.source.contains(subject.name, autoescape=True)
    return _drop_sources(tx, and_(campaign_version.c.campaign_id.in_(campaign_ids), named))


def _drop_sources(tx: Transaction, which: ColumnElement[bool]) -> int:
    drop = update(campaign_version).where(which, campaign_version.c.source != "").values(source="")
    rows = tx.connection.execute(drop.returning(campaign_version.c.campaign_id, campaign_version.c.number)).all()
    for campaign_id in sorted({row.campaign_id for row in rows}):
        versions = sorted(row.number for row in rows if row.campaign_id == campaign_id)
        tx.record(Event.SOURCES_DELETED, f"campaign:{campaign_id}", versions=versions)
    return len(rows)


def campaigns_of(connection: Connection, subject: str, *, team: str) -> list[int]:
    """List campaigns in which jobs hold this subject's data."""
    mine = select(campaign.c.id).join(job, job.c.campaign_id == campaign.c.id)
    mine = mine.where(campaign.c.team == team, job.c.subject == subject)
    return list(connection.execute(mine.distinct().order_by(campaign.c.id)).scalars())


def extent(connection: Connection, subject: str, *, team: str) -> tuple[int, int]:
    """Count the jobs that hold this subject's data, and their pictures."""
    mine = select(job.c.id).join(campaign, campaign.c.id == job.c.campaign_id)
    mine = mine.where(campaign.c.team == team, job.c.subject == subject)
    jobs = select(func.count()).select_from(mine.subquery())
    pictures = select(func.count()).where(image.c.job_id.in_(mine), image.c.deleted_at.is_(None))
    return int(connection.execute(jobs).scalar_one()), int(connection.execute(pictures).scalar_one())


def cancel_unfinished(tx: Transaction, subject: str, *, campaign_id: int) -> int:
    """Cancel the unfinished jobs of this subject."""
    return job_control.cancel(
        tx, campaign_id=campaign_id, chosen=and_(job.c.subject == subject, job.c.status.in_(UNFINISHED))
    )


def held(connection: Connection, subject: str, *, campaign_id: int, limit: int) -> list[Held]:
    """List the first ended jobs of a campaign that hold this subject's data."""
    columns = (job.c.id, job.c.campaign_id, campaign.c.team, campaign.c.name, job.c.stage, job.c.fingerprint)
    statement = (
        select(*columns, job.c.request)
        .join(campaign, campaign.c.id == job.c.campaign_id)
        .where(job.c.campaign_id == campaign_id, job.c.subject == subject, job.c.status.not_in(UNFINISHED))
        .order_by(job.c.id)
        .limit(limit)
    )
    return [
        Held(
            id=row.id,
            campaign_id=row.campaign_id,
            team=row.team,
            campaign=row.name,
            stage=row.stage,
            fingerprint=row.fingerprint,
            inputs=stored_inputs(row.request),
        )
        for row in connection.execute(statement)
    ]


def stored_inputs(request: Json) -> frozenset[str]:
    """Return digests of the outside pictures that a request consumes and our storage has."""
    if "checkpoint" not in request:
        return frozenset()
    sources = request_from_document({"prompt": ""} | {n: v for n, v in request.items() if n != ERASED}).sources()
    return frozenset(each.digest for each in sources.values() if each.stage is None and each.url is None)


def in_use_by_others(connection: Connection, digests: Iterable[str], subject: str) -> set[str]:
    """Return those of the inputs that another subject's job, or one without a subject, also uses."""
    others = or_(job.c.subject.is_(None), job.c.subject != subject)
    return {
        digest
        for digest in digests
        if connection.execute(
            select(job.c.id).where(others, cast(job.c.request, Text).contains(digest, autoescape=True)).limit(1)
        ).first()
    }


def wanted_by_others(connection: Connection, fingerprints: Collection[str], subject: str) -> set[str]:
    """Return those of the fingerprints that others' jobs have: objects in their folder may be theirs."""
    others = and_(or_(job.c.subject.is_(None), job.c.subject != subject), job.c.erased_at.is_(None))
    return set(
        connection.execute(select(job.c.fingerprint).where(others, job.c.fingerprint.in_(fingerprints))).scalars()
    )
