"""Publishing a campaign version: what is new, changed or removed is decided in the database, in one transaction."""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    and_,
    delete,
    exists,
    func,
    insert,
    literal,
    select,
    update,
)

from sdpipeline.batching import batch_document
from sdpipeline.db import control
from sdpipeline.db.audit import Event, Transaction
from sdpipeline.db.connection import insert_ignoring, now_s
from sdpipeline.db.tables import campaign, campaign_version, job, job_parent, work_group
from sdpipeline.domain import JobSpec, to_document
from sdpipeline.merkle import root

CHUNK = 1000

_temporary = MetaData()
_incoming = Table(
    "incoming_job",
    _temporary,
    Column("identity", String(64), primary_key=True),
    Column("group_id", BigInteger, nullable=False),
    Column("edition", String(63), nullable=False),
    Column("stage", String(63), nullable=False),
    Column("depth", SmallInteger, nullable=False),
    Column("row_key", Text, nullable=False),
    Column("variables", JSON, nullable=False),
    Column("axes", JSON, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("request", JSON, nullable=False),
    Column("salt", String(32), nullable=False),
    Column("position", BigInteger, nullable=False),
    prefixes=["TEMPORARY"],
)
_incoming_parent = Table(
    "incoming_parent",
    _temporary,
    Column("identity", String(64), primary_key=True),
    Column("parent_identity", String(64), primary_key=True),
    prefixes=["TEMPORARY"],
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """What a submit did. ``added`` counts new, changed and revived jobs."""

    campaign_id: int
    version: int
    added: int
    unchanged: int
    cancelled: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What a submit would do."""

    new: int
    unchanged: int
    removed: int


def submit(
    tx: Transaction,
    jobs: Iterable[JobSpec],
    *,
    team: str,
    name: str,
    source: str,
    priority: int,
    max_attempts: int,
    prune: bool = False,
) -> Submitted:
    """Make the campaign's newest version what ``jobs`` says; workers see all of it or nothing."""
    connection = tx.connection
    campaign_id = _campaign_id(connection, team, name, priority)
    with _temporary_tables(connection):
        editions = _load(connection, campaign_id, jobs)
        version_id, number = _insert_version(tx, campaign_id, source)
        unchanged = _count(connection, _same(campaign_id))
        added = _change(connection, campaign_id) + _insert_new(connection, campaign_id, version_id, max_attempts)
        _link_parents(connection, campaign_id)
        connection.execute(
            update(job)
            .where(job.c.campaign_id == campaign_id, job.c.identity.in_(select(_incoming.c.identity)))
            .values(version_id=version_id)
        )
        control.settle(tx, campaign_id=campaign_id)
        gone = _removed(editions)
        cancelled = control.cancel(tx, campaign_id=campaign_id, chosen=gone) if prune else 0
    asked = jobs_root(connection, version_id)
    result = {"jobs_added": added, "jobs_root": asked}
    connection.execute(update(campaign_version).where(campaign_version.c.id == version_id).values(**result))
    connection.execute(
        update(campaign).where(campaign.c.id == campaign_id).values(version_id=version_id, priority=priority)
    )
    tx.record(
        Event.CAMPAIGN_SUBMITTED,
        f"campaign:{campaign_id}",
        version=number,
        source_sha256=hashlib.sha256(source.encode()).hexdigest(),
        version_id=version_id,
        jobs_root=asked,
        added=added,
        unchanged=unchanged,
        cancelled=cancelled,
    )
    return Submitted(campaign_id=campaign_id, version=number, added=added, unchanged=unchanged, cancelled=cancelled)


def compare(connection: Connection, jobs: Iterable[JobSpec], *, team: str, name: str) -> Difference:
    """What :func:`submit` would do, without writing: identities are looked up in chunks."""
    campaign_id = connection.execute(
        select(campaign.c.id).where(campaign.c.team == team, campaign.c.name == name)
    ).scalar()
    new = unchanged = present = 0
    editions: set[str] = set()
    for chunk in _chunks(jobs):
        wanted = {spec.identity: spec.fingerprint for spec in chunk}
        editions |= {spec.edition for spec in chunk}
        rows = connection.execute(
            select(job.c.identity, job.c.fingerprint).where(
                job.c.campaign_id == campaign_id, job.c.identity.in_(wanted), job.c.status != "cancelled"
            )
        ).all()
        same = sum(wanted[row.identity] == row.fingerprint for row in rows)
        unchanged += same
        new += len(wanted) - same
        present -= len(rows)
    present += connection.execute(
        select(func.count()).where(
            job.c.campaign_id == campaign_id, job.c.edition.in_(editions), job.c.status != "cancelled"
        )
    ).scalar_one()
    return Difference(new=new, unchanged=unchanged, removed=present)


def _chunks(jobs: Iterable[JobSpec]) -> Iterator[list[JobSpec]]:
    iterator = iter(jobs)
    while chunk := list(itertools.islice(iterator, CHUNK)):
        yield chunk


def _campaign_id(connection: Connection, team: str, name: str, priority: int) -> int:
    values = {"team": team, "name": name, "priority": priority}
    connection.execute(insert_ignoring(connection, campaign).values(**values, created_at=now_s()))
    found = select(campaign.c.id).where(campaign.c.team == team, campaign.c.name == name).with_for_update()
    return int(connection.execute(found).scalar_one())


@contextmanager
def _temporary_tables(connection: Connection) -> Iterator[None]:
    """Made and dropped inside the transaction, so that a failure leaves nothing behind."""
    _temporary.create_all(connection, checkfirst=False)
    yield
    _temporary.drop_all(connection, checkfirst=False)


def _load(connection: Connection, campaign_id: int, jobs: Iterable[JobSpec]) -> set[str]:
    """Stream the jobs into temporary tables; returns their editions."""
    editions: set[str] = set()
    groups: dict[tuple[str, str], int] = {}
    position = itertools.count()
    for chunk in _chunks(jobs):
        editions.update(spec.edition for spec in chunk)
        rows = [_row(spec, _group(connection, campaign_id, spec, groups), next(position)) for spec in chunk]
        connection.execute(insert(_incoming), rows)
        pairs = [{"identity": spec.identity, "parent_identity": parent} for spec in chunk for _, parent in spec.parents]
        if pairs:
            connection.execute(insert_ignoring(connection, _incoming_parent), pairs)
    return editions


def jobs_root(connection: Connection, version_id: int) -> str:
    """Merkle root over the jobs of a version: what the audit log says was asked for."""
    rows = select(job.c.identity, job.c.fingerprint).where(job.c.version_id == version_id).order_by(job.c.identity)
    leaves = connection.execute(rows.execution_options(yield_per=CHUNK))
    return root(f"{row.identity}{row.fingerprint}".encode() for row in leaves).hex()


def _row(spec: JobSpec, group_id: int, position: int) -> dict[str, Any]:
    return {
        "identity": spec.identity,
        "group_id": group_id,
        "edition": spec.edition,
        "stage": spec.stage,
        "depth": spec.depth,
        "row_key": spec.row_key,
        "variables": dict(spec.variables),
        "axes": dict(spec.axes),
        "seed": spec.seed,
        "fingerprint": spec.fingerprint,
        "request": to_document(spec.request),
        "salt": secrets.token_hex(16),
        "position": position,
    }


def _group(connection: Connection, campaign_id: int, spec: JobSpec, known: dict[tuple[str, str], int]) -> int:
    key = (spec.stage, spec.batch_key)
    if key not in known:
        values = {
            "campaign_id": campaign_id,
            "stage": spec.stage,
            "depth": spec.depth,
            "batch_key": spec.batch_key,
            "checkpoint_digest": spec.request.checkpoint.digest,
            "description": batch_document(spec.request),
        }
        connection.execute(insert_ignoring(connection, work_group).values(**values))
        found = select(work_group.c.id).where(
            work_group.c.campaign_id == campaign_id,
            work_group.c.stage == spec.stage,
            work_group.c.batch_key == spec.batch_key,
        )
        known[key] = int(connection.execute(found).scalar_one())
    return known[key]


def _insert_version(tx: Transaction, campaign_id: int, source: str) -> tuple[int, int]:
    number = (
        tx.connection.execute(
            select(func.coalesce(func.max(campaign_version.c.number), 0)).where(
                campaign_version.c.campaign_id == campaign_id
            )
        ).scalar_one()
        + 1
    )
    row = {
        "campaign_id": campaign_id,
        "number": number,
        "source": source,
        "source_sha256": hashlib.sha256(source.encode()).hexdigest(),
        "jobs_added": 0,
        "jobs_root": "",
        "actor": tx.actor,
    }
    statement = insert(campaign_version).values(**row, created_at=now_s()).returning(campaign_version.c.id)
    return int(tx.connection.execute(statement).scalar_one()), int(number)


def _same(campaign_id: int) -> Any:
    return (
        select(func.count())
        .select_from(_incoming.join(job, job.c.identity == _incoming.c.identity))
        .where(
            job.c.campaign_id == campaign_id,
            job.c.fingerprint == _incoming.c.fingerprint,
            job.c.status != "cancelled",
        )
    )


def _count(connection: Connection, statement: Any) -> int:
    return int(connection.execute(statement).scalar_one())


def _change(connection: Connection, campaign_id: int) -> int:
    """Jobs whose pixels would differ now, and cancelled ones that are wanted again, start anew."""
    matching = and_(job.c.campaign_id == campaign_id, job.c.identity == _incoming.c.identity)
    differs = (job.c.fingerprint != _incoming.c.fingerprint) | (job.c.status == "cancelled")
    ids = list(connection.execute(select(job.c.id).select_from(_incoming.join(job, matching)).where(differs)).scalars())
    for start in range(0, len(ids), CHUNK):
        some = job.c.id.in_(ids[start : start + CHUNK])
        connection.execute(delete(job_parent).where(job_parent.c.job_id.in_(ids[start : start + CHUNK])))
        control.reset(connection, some)
        fresh = {
            name: select(_incoming.c[name]).where(_incoming.c.identity == job.c.identity).scalar_subquery()
            for name in ("group_id", "depth", "fingerprint", "request")
        }
        connection.execute(update(job).where(some).values(**fresh))
    return len(ids)


def _insert_new(connection: Connection, campaign_id: int, version_id: int, max_attempts: int) -> int:
    names = [column.name for column in _incoming.columns if column.name != "position"]
    known = exists().where(job.c.campaign_id == campaign_id, job.c.identity == _incoming.c.identity)
    constants = {
        "campaign_id": literal(campaign_id),
        "version_id": literal(version_id),
        "max_attempts": literal(max_attempts),
        "status": literal("new"),
        "created_at": now_s(),
    }
    rows = select(*(_incoming.c[name] for name in names), *constants.values()).where(~known)
    # In the file's order, so that ids, and with them the order of work, follow the file.
    statement = insert(job).from_select([*names, *constants], rows.order_by(_incoming.c.position))
    return int(connection.execute(statement).rowcount)


def _link_parents(connection: Connection, campaign_id: int) -> None:
    child, parent = job.alias("child"), job.alias("parent")
    pairs = (
        select(child.c.id, parent.c.id)
        .select_from(_incoming_parent)
        .join(child, and_(child.c.identity == _incoming_parent.c.identity, child.c.campaign_id == campaign_id))
        .join(
            parent, and_(parent.c.identity == _incoming_parent.c.parent_identity, parent.c.campaign_id == campaign_id)
        )
        .where(child.c.status == "new")
    )
    connection.execute(insert_ignoring(connection, job_parent).from_select(["job_id", "parent_id"], pairs))


def _removed(editions: set[str]) -> Any:
    return and_(
        job.c.edition.in_(editions),
        job.c.identity.not_in(select(_incoming.c.identity)),
        job.c.status != "cancelled",
    )
