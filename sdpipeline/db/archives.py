"""Archiving of closed editions: move their rows out of the workers' tables and record their location."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, and_, case, delete, exists, func, insert, or_, select, update

from sdpipeline.db import audit_subjects
from sdpipeline.db.audit import Event, Transaction
from sdpipeline.db.connection import now_s
from sdpipeline.db.locks import lock_campaign
from sdpipeline.db.retention import DAY_S, UNFINISHED, committed
from sdpipeline.db.tables import LOOKS, archive, attempt, audit_event, campaign, image, job, job_parent
from sdpipeline.domain import Json

_PAGE = 500
_PRIVATE = ("subject", "row_key", "variables", "axes", "request", "salt", "error")
_PUBLIC = (
    "id",
    "version_id",
    "stage",
    "depth",
    "seed",
    "identity",
    "fingerprint",
    "status",
    "attempt",
    "error_kind",
    "created_at",
    "finished_at",
    "erased_at",
)
_UNSEEN: Json = {"scores": {}} | dict.fromkeys(LOOKS)
"""Values in the permanent archive object in place of a subject's picture's scores and hash: none."""
_ENDED_AT = func.coalesce(job.c.finished_at, job.c.created_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Edition:
    """One closed edition of a campaign; ``state`` changes with any change to its jobs or pictures."""

    campaign_id: int
    team: str
    campaign: str
    edition: str
    first_job: int
    last_job: int
    newest_at: float
    state: tuple[Any, ...]


def closed(connection: Connection, *, team: str, days: float) -> list[Edition]:
    """List editions whose jobs all ended ``days`` ago and have no job in their campaign's current version."""
    found = connection.execute(_editions(campaign.c.team == team, _ENDED_AT.is_not(None), before_days=days)).all()
    return [_edition(connection, row) for row in found]


def _editions(*which: Any, before_days: float | None) -> Select[Any]:
    open_jobs = func.sum(case((job.c.status.in_(UNFINISHED), 1), else_=0))
    present = func.sum(case((job.c.version_id == campaign.c.version_id, 1), else_=0))
    columns = (job.c.campaign_id, campaign.c.team, campaign.c.name.label("campaign"), job.c.edition)
    statement = (
        select(
            *columns,
            func.min(job.c.id).label("first_job"),
            func.max(job.c.id).label("last_job"),
            func.max(_ENDED_AT).label("newest_at"),
            func.count().label("jobs"),
            func.sum(job.c.attempt).label("attempts"),
            func.count(job.c.erased_at).label("erased"),
            func.count(job.c.subject).label("subjects"),
        )
        .join(campaign, campaign.c.id == job.c.campaign_id)
        .where(*which)
        .group_by(*columns, campaign.c.id)
        .having(open_jobs == 0, present == 0)
        .order_by(job.c.campaign_id, job.c.edition)
    )
    if before_days is not None:
        statement = statement.having(func.max(_ENDED_AT) < now_s() - before_days * DAY_S)
    return statement


def _edition(connection: Connection, row: Any) -> Edition:
    mine = (job.c.campaign_id == row.campaign_id, job.c.edition == row.edition)
    pictures = select(func.count(), func.count(image.c.deleted_at)).join(job, job.c.id == image.c.job_id).where(*mine)
    state = (row.newest_at, row.jobs, int(row.attempts), row.erased, row.subjects, *connection.execute(pictures).one())
    names = ("campaign_id", "team", "campaign", "edition", "first_job", "last_job", "newest_at")
    return Edition(**{name: getattr(row, name) for name in names}, state=state)


def lines(connection: Connection, edition: Edition) -> Iterator[tuple[Json, Json | None]]:
    """Yield every job with attempts, pictures and event positions, and its private part if it still exists."""
    after = 0
    mine = and_(job.c.campaign_id == edition.campaign_id, job.c.edition == edition.edition)
    while (
        rows := connection.execute(select(job).where(mine, job.c.id > after).order_by(job.c.id).limit(_PAGE))
        .mappings()
        .all()
    ):
        ids = [row["id"] for row in rows]
        tries, pictures = _by_job(connection, attempt, ids), _by_job(connection, image, ids)
        parents, events = _by_job(connection, job_parent, ids), _events(connection, ids)
        for row in rows:
            public = {name: row[name] for name in _PUBLIC} | {"commitment": committed(row["request"], row["salt"])}
            public["parents"] = sorted(each["parent_id"] for each in parents.get(row["id"], ()))
            # Leave the error out: it may name a file or a value.
            public["attempts"] = [{n: v for n, v in each.items() if n != "error"} for each in tries.get(row["id"], ())]
            own = pictures.get(row["id"], [])
            public["images"] = own if row["subject"] is None else [each | _UNSEEN for each in own]
            public["events"] = events.get(row["id"], [])
            private = {"id": row["id"]} | {name: row[name] for name in _PRIVATE}
            if row["subject"] is not None:
                private["scores"] = {each["fingerprint"]: each["scores"] for each in own}
            yield public, None if row["erased_at"] is not None and row["subject"] is None else private
        after = ids[-1]


def _by_job(connection: Connection, table: Any, ids: list[int]) -> dict[int, list[Json]]:
    found: dict[int, list[Json]] = {}
    for row in connection.execute(select(table).where(table.c.job_id.in_(ids)).order_by(*table.primary_key)).mappings():
        found.setdefault(row["job_id"], []).append(dict(row))
    return found


def _events(connection: Connection, ids: list[int]) -> dict[int, list[list[Any]]]:
    columns = (audit_event.c.subject, audit_event.c.writer_id, audit_event.c.seq)
    own = select(*columns).where(audit_event.c.subject.in_([f"job:{job_id}" for job_id in ids]))
    found: dict[int, list[list[Any]]] = {}
    for subject, writer, seq in connection.execute(own.order_by(audit_event.c.writer_id, audit_event.c.seq)):
        found.setdefault(audit_subjects.job_id(subject), []).append([writer, seq])
    return found


def record(tx: Transaction, edition: Edition, stored: Json) -> bool:
    """Record the edition as archived; return False if it changed since it was read."""
    lock_campaign(tx.connection, edition.campaign_id)
    mine = (job.c.campaign_id == edition.campaign_id, job.c.edition == edition.edition)
    row = tx.connection.execute(_editions(*mine, before_days=None)).first()
    if row is None or _edition(tx.connection, row) != edition:
        return False
    own = {"campaign_id": edition.campaign_id, "edition": edition.edition, "newest_at": edition.newest_at}
    own |= {"first_job": edition.first_job, "last_job": edition.last_job}
    tx.connection.execute(insert(archive).values(**own, **stored, created_at=now_s()))
    about = {name: stored[name] for name in ("key", "sha256")}
    tx.record(
        Event.EDITION_ARCHIVED, f"campaign:{edition.campaign_id}", edition=edition.edition, jobs=row.jobs, **about
    )
    return True


def left_behind(connection: Connection, *, team: str) -> list[tuple[int, str]]:
    """List archived editions that still have rows in the tables."""
    has_jobs = exists().where(job.c.campaign_id == archive.c.campaign_id, job.c.edition == archive.c.edition)
    archived = select(archive.c.campaign_id, archive.c.edition).join(campaign, campaign.c.id == archive.c.campaign_id)
    return [(row[0], row[1]) for row in connection.execute(archived.where(campaign.c.team == team, has_jobs))]


def drop(connection: Connection, campaign_id: int, edition: str, *, limit: int) -> int:
    """Delete the first jobs of an archived edition from the tables; return their number."""
    lock_campaign(connection, campaign_id)
    first = select(job.c.id).where(job.c.campaign_id == campaign_id, job.c.edition == edition)
    ids = list(connection.execute(first.order_by(job.c.id).limit(limit)).scalars())
    if not ids:
        return 0
    connection.execute(delete(job_parent).where(or_(job_parent.c.job_id.in_(ids), job_parent.c.parent_id.in_(ids))))
    for table in (attempt, image):
        connection.execute(delete(table).where(table.c.job_id.in_(ids)))
    connection.execute(delete(job).where(job.c.id.in_(ids)))
    return len(ids)


def archives(connection: Connection, *, team: str | None = None, job_id: int | None = None) -> list[Json]:
    """List archived editions with team and campaign by name; with ``job_id``, those that may hold that job."""
    statement = select(archive, campaign.c.team, campaign.c.name).join(campaign, campaign.c.id == archive.c.campaign_id)
    if team is not None:
        statement = statement.where(campaign.c.team == team)
    if job_id is not None:
        statement = statement.where(archive.c.first_job <= job_id, archive.c.last_job >= job_id)
    rows = connection.execute(statement.order_by(archive.c.campaign_id, archive.c.edition)).mappings()
    return [dict(row) for row in rows]


def is_archived(connection: Connection, *, team: str, name: str, edition: str) -> bool:
    """Return True if that edition of a campaign was archived."""
    mine = select(archive.c.edition).join(campaign, campaign.c.id == archive.c.campaign_id)
    mine = mine.where(campaign.c.team == team, campaign.c.name == name, archive.c.edition == edition)
    return connection.execute(mine).first() is not None


def events_of(connection: Connection, job_id: int) -> list[str]:
    """List the events of a job, which are not moved by archiving."""
    return list(
        connection.execute(select(audit_event.c.body).where(audit_event.c.subject == f"job:{job_id}")).scalars()
    )


def now(connection: Connection) -> float:
    """Return the time of the database's clock."""
    return float(connection.execute(select(now_s())).scalar_one())


def change(connection: Connection, row: Json, **values: Any) -> None:
    """Update an archived edition's row after its pictures or private part changed."""
    mine = and_(archive.c.campaign_id == row["campaign_id"], archive.c.edition == row["edition"])
    connection.execute(update(archive).where(mine).values(**values))
