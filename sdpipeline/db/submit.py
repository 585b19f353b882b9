"""Publication of a campaign version: new, changed and removed jobs are determined in one database transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    and_,
    case,
    delete,
    exists,
    false,
    func,
    insert,
    literal,
    not_,
    null,
    or_,
    select,
    update,
)

from sdpipeline.db import budgets, job_control, registry, restore
from sdpipeline.db.audit import Event, Transaction
from sdpipeline.db.connection import insert_ignoring, now_s
from sdpipeline.db.descendants import skip_descendants
from sdpipeline.db.locks import lock_campaign
from sdpipeline.db.queue import abandon_campaign_attempts
from sdpipeline.db.staging import (
    POLICY,
    Group,
    Prepared,
    incoming,
    incoming_parent,
    known,
    load,
    load_first,
    match,
    temporary_tables,
)
from sdpipeline.db.tables import campaign, campaign_version, group_checkpoint, job, job_parent, work_group
from sdpipeline.domain import Json
from sdpipeline.errors import Mistake
from sdpipeline.merkle import root

CHUNK = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """Result of a submit.

    ``added`` counts new, changed and revived jobs, ``changed`` those of them that existed before. ``blocked`` counts
    all requested jobs that a policy forbids; ``left_out`` says why nothing was done. ``warnings`` are those
    about the campaign file.
    """

    campaign_id: int
    version: int
    added: int
    unchanged: int
    cancelled: int
    changed: int = 0
    blocked: int = 0
    left_out: str | None = None
    warnings: Sequence[Mistake] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """A campaign's newest version without its jobs: owner, file text and campaign-wide values."""

    team: str
    name: str
    source: str
    priority: int
    max_attempts: int
    budget: Json | None = None


def submit(tx: Transaction, ready: Prepared, asked: Publication, *, prune: bool = False) -> Submitted:
    """Publish ``ready`` as the campaign's newest version; workers see all of it or nothing."""
    connection, source = tx.connection, asked.source
    campaign_id = _campaign_id(connection, asked.team, asked.name, asked.priority)
    groups = [_group_id(connection, campaign_id, group) for group in ready.groups]
    with temporary_tables(connection):
        lock_campaign(connection, campaign_id)
        budgets.set_terms(tx, campaign_id, budget=asked.budget, priority=asked.priority)
        if not _any(connection, job.c.campaign_id == campaign_id):
            version_id, number = _insert_version(tx, campaign_id, source)
            constants = {"campaign_id": campaign_id, "version_id": version_id, "max_attempts": asked.max_attempts}
            created_at = connection.execute(select(now_s())).scalar_one()
            load_first(connection, ready, groups, created_at=created_at, **constants)
            _link_parents(connection)
            added, changed, unchanged, cancelled = ready.count, 0, 0, 0
            if ready.blocked:
                _record_blocked(tx, campaign_id)
        else:
            load(connection, ready, campaign_id, groups)
            match(connection)
            unchanged = _count(connection, select(func.count()).where(known.c.same))
            present = _existing_jobs(campaign_id, ready.editions)
            gone = prune and _any(connection, and_(present, ~exists().where(known.c.id == job.c.id)))
            changes = gone or unchanged < ready.count or (ready.blocked and _any(connection, _to_block()))
            changes = changes or _any(connection, or_(_moved(), _of_others(campaign_id, ready)))
            same = None if changes else _same_version(connection, campaign_id, source, unchanged)
            if same is not None:
                return _submitted(ready, campaign_id, same, added=0, unchanged=unchanged, cancelled=0)
            version_id, number = _insert_version(tx, campaign_id, source)
            changed = _change(tx, campaign_id, version_id)
            added = changed + _insert_new(connection, version_id, asked.max_attempts)
            _link_parents(connection)
            _keep(connection, version_id)
            if ready.blocked:
                _block_known(connection, campaign_id)
            job_control.resolve_new_jobs(tx, campaign_id=campaign_id)
            if ready.blocked:
                _record_blocked(tx, campaign_id)
            if not ready.held:
                budgets.let_go(connection, campaign_id)
            # All requested jobs belong to this version now.
            chosen = and_(present, job.c.version_id != version_id)
            cancelled = job_control.cancel(tx, campaign_id=campaign_id, chosen=chosen) if gone else 0
    restore.claim(tx, campaign_id=campaign_id)
    registry.block_published(tx, campaign_id=campaign_id, version_id=version_id)
    jobs = jobs_root(connection, version_id)
    result = {"jobs_added": added, "jobs_root": jobs}
    connection.execute(update(campaign_version).where(campaign_version.c.id == version_id).values(**result))
    connection.execute(update(campaign).where(campaign.c.id == campaign_id).values(version_id=version_id))
    tx.record(
        Event.CAMPAIGN_SUBMITTED,
        f"campaign:{campaign_id}",
        version=number,
        source_sha256=_sha256(source),
        version_id=version_id,
        jobs_root=jobs,
        added=added,
        unchanged=unchanged,
        cancelled=cancelled,
        team=asked.team,
        name=asked.name,
        budget=asked.budget,
        priority=asked.priority,
    )
    return _submitted(
        ready, campaign_id, number, added=added, changed=changed, unchanged=unchanged, cancelled=cancelled
    )


def _submitted(
    ready: Prepared, campaign_id: int, version: int, *, added: int, unchanged: int, cancelled: int, changed: int = 0
) -> Submitted:
    return Submitted(
        campaign_id=campaign_id,
        version=version,
        added=added,
        changed=changed,
        unchanged=unchanged,
        cancelled=cancelled,
        blocked=ready.blocked,
    )


def _campaign_id(connection: Connection, team: str, name: str, priority: int) -> int:
    values = {"team": team, "name": name, "priority": priority}
    connection.execute(insert_ignoring(connection, campaign).values(**values, created_at=now_s()))
    found = select(campaign.c.id).where(campaign.c.team == team, campaign.c.name == name)
    return int(connection.execute(found).scalar_one())


def jobs_root(connection: Connection, version_id: int) -> str:
    """Compute the Merkle root over a version's jobs, which the audit log records as the request."""
    leaf = (job.c.identity + job.c.fingerprint).label("leaf")
    owner = select(campaign_version.c.campaign_id).where(campaign_version.c.id == version_id).scalar_subquery()
    mine = and_(job.c.campaign_id == owner, job.c.version_id == version_id)
    leaves = select(leaf).where(mine).order_by(job.c.identity)
    rows = connection.execute(leaves.execution_options(yield_per=10 * CHUNK)).scalars()
    return root(each.encode() for each in rows).hex()


def _group_id(connection: Connection, campaign_id: int, group: Group) -> int:
    values = {"campaign_id": campaign_id, "stage": group.stage, "depth": group.depth, "batch_key": group.batch_key}
    rules = group.rules.to_document()
    about = {"checkpoint_digest": group.checkpoint_digest, "description": group.description, "rules": rules}
    connection.execute(insert_ignoring(connection, work_group).values(**values | about))
    found = select(work_group.c.id).where(
        work_group.c.campaign_id == campaign_id,
        work_group.c.stage == group.stage,
        work_group.c.batch_key == group.batch_key,
    )
    group_id = int(connection.execute(found).scalar_one())
    connection.execute(update(work_group).where(work_group.c.id == group_id).values(rules=rules))
    needed = [{"group_id": group_id, "digest": digest} for digest in sorted(_digests(group.description))]
    connection.execute(insert_ignoring(connection, group_checkpoint), needed)
    return group_id


def _digests(description: Any) -> set[str]:
    """Return the digests of all weights in a batch document; input pictures are not part of it."""
    if isinstance(description, dict):
        own = {description["digest"]} if "digest" in description else set()
        return own.union(*(_digests(value) for value in description.values()))
    return set[str]().union(*(_digests(item) for item in description)) if isinstance(description, list) else set()


def _same_version(connection: Connection, campaign_id: int, source: str, count: int) -> int | None:
    """Return the number of the campaign's version if it is already exactly this one."""
    present = connection.execute(
        select(campaign_version.c.id, campaign_version.c.number)
        .join(campaign, campaign.c.version_id == campaign_version.c.id)
        .where(campaign.c.id == campaign_id, campaign_version.c.source_sha256 == _sha256(source))
    ).first()
    if present is None:
        return None
    asked = select(func.count()).where(job.c.campaign_id == campaign_id, job.c.version_id == present.id)
    return int(present.number) if _count(connection, asked) == count else None


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
        "source_sha256": _sha256(source),
        "jobs_added": 0,
        "jobs_root": "",
        "actor": tx.actor,
    }
    statement = insert(campaign_version).values(**row, created_at=now_s()).returning(campaign_version.c.id)
    return int(tx.connection.execute(statement).scalar_one()), int(number)


def _existing_jobs(campaign_id: int, editions: set[str]) -> ColumnElement[bool]:
    return and_(job.c.campaign_id == campaign_id, job.c.edition.in_(editions), job.c.status != "cancelled")


def _change(tx: Transaction, campaign_id: int, version_id: int) -> int:
    """Reset jobs whose pixels would differ now, and cancelled ones that are requested again."""
    connection = tx.connection
    differ = select(known.c.id).where(~known.c.same)
    ids = job_control.reset(connection, job.c.id.in_(differ), campaign_id=campaign_id)
    if not ids:
        return 0
    tx.record(Event.JOBS_CHANGED, f"campaign:{campaign_id}", jobs=sorted(ids))
    connection.execute(delete(job_parent).where(job_parent.c.job_id.in_(differ)))
    names = ("group_id", "depth", "fingerprint", "variables", "request", "chain", "subject", "error_kind", "error")
    fresh: dict[str, ColumnElement[Any]] = {name: incoming.c[name] for name in (*names, "row_key", "axes")}
    # An erased job lost its salt; any other keeps it, because its older pictures' commitments in the audit log use it.
    fresh["salt"] = case((job.c.erased_at.is_not(None), incoming.c.salt), else_=job.c.salt)
    fresh["erased_at"] = null()
    these = and_(job.c.id == known.c.id, ~known.c.same, incoming.c.identity == known.c.identity)
    connection.execute(update(job).where(these).values(version_id=version_id, **fresh))
    return len(ids)


def _keep(connection: Connection, version_id: int) -> None:
    """Move unchanged jobs to the new version, with the place of their chain in it."""
    these = and_(job.c.id == known.c.id, known.c.same, incoming.c.identity == known.c.identity)
    connection.execute(update(job).where(these, known.c.moved).values(request=incoming.c.request))
    subject = case((job.c.erased_at.is_(None), incoming.c.subject), else_=job.c.subject)
    values = {"version_id": version_id, "chain": incoming.c.chain, "subject": subject}
    connection.execute(update(job).where(these).values(**values))


def _moved() -> ColumnElement[bool]:
    """Match jobs whose input pictures have another address, pin or name now."""
    return job.c.id.in_(select(known.c.id).where(known.c.moved))


def _of_others(campaign_id: int, ready: Prepared) -> ColumnElement[bool]:
    """Match jobs whose only change is the subject of their data."""
    if not ready.subjects:
        return false()
    changed_subject = select(known.c.id).join(incoming, incoming.c.identity == known.c.identity)
    differs = incoming.c.subject.is_distinct_from(job.c.subject)
    mine = changed_subject.where(known.c.id == job.c.id, known.c.same, differs).exists()
    return and_(job.c.campaign_id == campaign_id, job.c.erased_at.is_(None), mine)


def _to_block() -> ColumnElement[bool]:
    """Match existing jobs that the newest policy forbids, including any that a retry could run."""
    existing = job.alias("existing")
    same_reason = and_(
        existing.c.status == "blocked", existing.c.error_kind == POLICY, existing.c.error == incoming.c.error
    )
    forbidden = (
        select(known.c.id)
        .join(incoming, incoming.c.identity == known.c.identity)
        .join(existing, existing.c.id == known.c.id)
        .where(incoming.c.error_kind.is_not(None), existing.c.status != "succeeded", not_(same_reason))
        .where(existing.c.erased_at.is_(None))
    )
    return job.c.id.in_(forbidden)


def _block_known(connection: Connection, campaign_id: int) -> None:
    chosen = _to_block()
    these = and_(job.c.id == known.c.id, incoming.c.identity == known.c.identity, chosen)
    why = {"error_kind": incoming.c.error_kind, "error": incoming.c.error}
    ended = {"status": "blocked", "lease_id": null(), "not_before": null(), "finished_at": now_s()}
    connection.execute(update(job).where(these).values(**ended, **why))
    abandon_campaign_attempts(connection, campaign_id)


def _record_blocked(tx: Transaction, campaign_id: int) -> None:
    """Record an audit event for jobs that a policy forbids, and skip their descendants."""
    mine = and_(job.c.campaign_id == campaign_id, job.c.status == "blocked", job.c.error_kind == POLICY)
    blocked = select(job.c.id).where(mine)
    jobs = list(tx.connection.execute(blocked.order_by(job.c.id)).scalars())
    tx.record(Event.JOBS_BLOCKED, f"campaign:{campaign_id}", jobs=jobs, rule=POLICY)
    skip_descendants(tx, blocked, f"campaign:{campaign_id}")


def _insert_new(connection: Connection, version_id: int, max_attempts: int) -> int:
    """Insert jobs that were not requested before; return their number.

    :func:`sdpipeline.db.job_control.resolve_new_jobs` is needed only for jobs with a parent older than themselves.
    """
    older = incoming_parent.join(known, known.c.identity == incoming_parent.c.parent_identity)
    child_of_older = select(incoming_parent.c.identity).select_from(older).distinct().subquery()
    own = [column for column in incoming.columns if column.name not in ("position", "parents")]
    values: dict[str, ColumnElement[Any]] = {column.name: column for column in own}
    values |= {
        "version_id": literal(version_id),
        "max_attempts": literal(max_attempts),
        "parents_left": incoming.c.parents,
        "status": case(
            (incoming.c.error_kind.is_not(None), "blocked"),
            (and_(incoming.c.parents == 0, incoming.c.chain.is_(None)), "ready"),
            (child_of_older.c.identity.is_not(None), "new"),
            else_="waiting",
        ),
        "created_at": now_s(),
    }
    rows = (
        select(*values.values())
        .select_from(incoming.outerjoin(child_of_older, child_of_older.c.identity == incoming.c.identity))
        .where(~exists().where(known.c.identity == incoming.c.identity))
        # In the file's order, so that ids, and thus the order of work, follow the file.
        .order_by(incoming.c.position)
    )
    statement = insert(job).from_select(list(values), rows).execution_options(preserve_rowcount=True)
    return int(connection.execute(statement).rowcount)


def _link_parents(connection: Connection) -> None:
    """Link new and changed jobs to their parents."""
    child, parent = job.alias("child"), job.alias("parent")
    pair = incoming_parent.c
    pairs = (
        select(child.c.id, parent.c.id)
        .select_from(incoming_parent)
        .join(child, and_(child.c.campaign_id == pair.campaign_id, child.c.identity == pair.identity))
        .join(parent, and_(parent.c.campaign_id == pair.campaign_id, parent.c.identity == pair.parent_identity))
        .where(~exists().where(known.c.identity == pair.identity, known.c.same))
    )
    connection.execute(insert(job_parent).from_select(["job_id", "parent_id"], pairs))


def _count(connection: Connection, statement: Select[int]) -> int:
    return int(connection.execute(statement).scalar_one())


def _any(connection: Connection, jobs: ColumnElement[bool]) -> bool:
    return connection.execute(select(job.c.id).where(jobs).limit(1)).first() is not None


def _sha256(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()
