"""Job transitions: one function per transition, each one short transaction with its audit event."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    CTE,
    ColumnElement,
    Connection,
    Select,
    Subquery,
    and_,
    case,
    exists,
    func,
    insert,
    literal,
    literal_column,
    null,
    or_,
    select,
    true,
    tuple_,
    update,
)

from sdpipeline.db import budgets, similar_images
from sdpipeline.db.audit import Event, Transaction
from sdpipeline.db.budgets import Charge
from sdpipeline.db.connection import now_s
from sdpipeline.db.locks import share_campaigns
from sdpipeline.db.tables import attempt, campaign, campaign_version, image, job, job_parent, lease, work_group
from sdpipeline.domain import Json, Status, digest, request_from_document
from sdpipeline.jobs import DeliveryRules, Lease, LeasedJob, ParentImage, StoredImage

READY: ColumnElement[str] = literal_column("'ready'")
LEASED: ColumnElement[str] = literal_column("'leased'")
WAITING: ColumnElement[str] = literal_column("'waiting'")
"""Literals, because a bound value cannot match a partial index under a generic plan."""

MOST_REAPED = 100
MOST_PROMOTED = 1000
"""Limit per transaction; the next call takes the rest."""

BEFORE_ALL = -(2**15) - 1
LONGEST_HINT_S = 30.0
SHORT_HINT_S = 1.0
LOOKING_SHARE = 0.02

EQUALISER = 100.0
"""Added to a priority number to make it a weight: the highest waits at most eleven times as long as 0."""

LEAD_KEPT = 0.8
"""Fraction of the lead time that is kept when a lease begins sooner."""

SKIPPED: Mapping[str, Any] = {
    "finished_at": now_s(),
    "error_kind": "AncestorNotSucceeded",
    "error": "a parent of this job did not succeed; retry the parent",
}


@dataclass(slots=True)
class AgingPolicy:
    """Aging policy: how long ready jobs of a checkpoint may wait before they override priority.

    A checkpoint that waited longer goes first, but not twice in a row at one worker. So many overdue checkpoints take
    at most half of a worker from the campaign that is next in order.

    A lease begins ``lead_s`` after it was taken, behind earlier leases. The last of ``others`` waiting checkpoints
    begins after one lease of each and the normal lease in between. Therefore all of them go first that much sooner.
    """

    max_wait_s: float = math.inf
    gave_way: bool = False
    lead_s: float = 0.0
    others: int = 0

    @property
    def due_after_s(self) -> float:
        """Seconds without a lease after which a checkpoint goes first, so that it begins within ``max_wait_s``.

        It is at least half of ``max_wait_s``, or devices would do little else than load.
        """
        return self.max_wait_s - min(2 * self.lead_s * self.others, self.max_wait_s / 2)

    def begun(self, after_s: float) -> None:
        """Record the seconds from taking a lease to its begin; one short delay lowers the estimate slowly."""
        self.lead_s = max(after_s, self.lead_s * LEAD_KEPT)


@dataclass(slots=True)
class Cursor:
    """Position of a worker's last ready jobs in each group: a hint that keeps the index scan short.

    While a transaction holds an old snapshot, the index entries of leased jobs stay and every lease would read them
    again. Jobs that become ready behind the cursor are seen when it is forgotten. That is after ``LONGEST_HINT_S``, or
    after ``SHORT_HINT_S`` if it finds no full batch. It is later if a full scan took so long that it would exceed
    ``LOOKING_SHARE`` of the time.
    """

    aging: AgingPolicy = field(default_factory=AgingPolicy)
    after: dict[int, tuple[int, int]] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)
    took_s: float = 0.0

    def forget(self, *, older_than_s: float) -> bool:
        """Clear the cursor for a full scan, unless that was done recently; return True if cleared."""
        if not self.after or time.monotonic() - self.since < max(older_than_s, self.took_s / LOOKING_SHARE):
            return False
        self.after.clear()
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _LeaseRequest:
    """Constraints of a lease request; ``max_wait_s`` is None if no campaign may go out of turn."""

    limit: int
    campaign_id: int | None
    resident: Collection[str]
    full_only: bool
    max_wait_s: float | None


def take_lease(
    tx: Transaction,
    *,
    worker_id: str,
    limit: int,
    ttl_s: float,
    campaign_id: int | None = None,
    resident: Collection[str] = (),
    full_only: bool = False,
    cursor: Cursor | None = None,
) -> Lease | None:
    """Lease up to ``limit`` ready jobs of one group, or ``None`` if there are none.

    The campaign with the lowest priority number goes first, unless another waited too long. Ties are broken by
    checkpoints in ``resident``, then full batches, then the campaign whose last lease is longest ago. Within a campaign
    deeper stages go first, so that chains are finished rather than begun. With ``full_only`` a partial batch is left
    alone if the caller's work in flight may fill it.
    """
    cursor = cursor or Cursor()
    patience = cursor.aging
    cursor.forget(older_than_s=LONGEST_HINT_S)
    bounded = not patience.gave_way and patience.max_wait_s < math.inf
    wish = _LeaseRequest(
        limit=limit,
        campaign_id=campaign_id,
        resident=resident,
        full_only=full_only,
        max_wait_s=patience.due_after_s if bounded else None,
    )
    groups = _groups(tx.connection, wish, cursor)
    if not (groups and groups[0].ready >= limit) and cursor.forget(older_than_s=SHORT_HINT_S):
        groups = _groups(tx.connection, wish, cursor)
    patience.gave_way = False
    patience.others = len({group.checkpoint_digest for group in groups}.difference(resident))
    for group_id, checkpoint_digest, ready, out_of_turn in groups:
        lease_id = secrets.token_hex(16)
        _insert_lease(tx.connection, lease_id, worker_id, group_id, ttl_s)
        # If a possible poison job ran while other work is in flight, one could take the other down.
        alone_too = not full_only or ready >= limit or bool(out_of_turn)
        rows = _claim(tx.connection, group_id, lease_id, limit, cursor, alone_too=alone_too)
        if rows:
            patience.gave_way = bool(out_of_turn)
            _insert_attempts(tx.connection, rows, lease_id, worker_id)
            tx.record(Event.LEASE_TAKEN, f"lease:{lease_id}", worker=worker_id, jobs=[[r.id, r.attempt] for r in rows])
            jobs = _leased_jobs(tx.connection, rows)
            return Lease(id=lease_id, group_id=group_id, checkpoint_digest=checkpoint_digest, jobs=jobs)
        tx.connection.execute(lease.delete().where(lease.c.id == lease_id))
    return None


def _groups(connection: Connection, wish: _LeaseRequest, cursor: Cursor) -> Sequence[Any]:
    """List groups with ready jobs, best first; counting stops at the limit, so queue depth does not matter."""
    statement = _ordered(_filled(wish, cursor), wish)
    started = time.monotonic()
    found = connection.execute(statement).all()
    if not cursor.after:
        cursor.since = time.monotonic()
        cursor.took_s = cursor.since - started
    return found


def _filled(wish: _LeaseRequest, cursor: Cursor) -> Subquery:
    """Select every group of an active campaign with its number of ready jobs and the start of its wait."""
    of_group = and_(job.c.group_id == work_group.c.id, job.c.status == READY)
    if cursor.after:
        # One value per group, in the order of the index.
        after = [
            case({n: at[k] for n, at in cursor.after.items()}, value=work_group.c.id, else_=BEFORE_ALL) for k in (0, 1)
        ]
        of_group = and_(of_group, tuple_(job.c.priority, job.c.id) > tuple_(*after))
    first_few = select(literal(1).label("one")).where(of_group).correlate(work_group).limit(wish.limit).subquery()
    ready = select(func.count()).select_from(first_few).scalar_subquery()
    resident = list(wish.resident)
    loaded = case((work_group.c.checkpoint_digest.in_(resident), 0), else_=1) if resident else literal(1)
    leased_at = select(func.max(lease.c.created_at)).where(lease.c.group_id == work_group.c.id).scalar_subquery()
    filled = (
        select(
            work_group.c.id,
            work_group.c.checkpoint_digest,
            work_group.c.campaign_id,
            work_group.c.depth,
            campaign.c.priority,
            ready.label("ready"),
            loaded.label("loaded"),
            func.coalesce(campaign_version.c.created_at, campaign.c.created_at).label("published_at"),
            func.coalesce(leased_at, 0.0).label("leased_at"),
        )
        .join(campaign, campaign.c.id == work_group.c.campaign_id)
        .outerjoin(campaign_version, campaign_version.c.id == campaign.c.version_id)
        .where(campaign.c.status == "active")
    )
    if wish.campaign_id is not None:
        filled = filled.where(campaign.c.id == wish.campaign_id)
    return filled.subquery()


def _ordered(filled: Subquery, wish: _LeaseRequest) -> Select[Any]:
    """Order the groups to try; a campaign waits since its last lease, or since it was published.

    A resident checkpoint's work is finished, including the last partial batch, before another checkpoint is loaded,
    because loading takes longer than most batches. Each checkpoint of a campaign ages separately, so that its wait is
    bounded.
    """
    since = case((filled.c.leased_at > filled.c.published_at, filled.c.leased_at), else_=filled.c.published_at)
    now = select(now_s()).scalar_subquery()  # PostgreSQL would read its clock again for each group
    of_checkpoint = [filled.c.campaign_id, filled.c.checkpoint_digest]
    g = select(
        *filled.c,
        (now - func.max(since).over(partition_by=filled.c.campaign_id)).label("waited"),
        (now - func.max(since).over(partition_by=of_checkpoint)).label("checkpoint_waited"),
    ).subquery()
    full = g.c.ready >= wish.limit
    turn = (g.c.priority, g.c.loaded, case((full, 0), else_=1), g.c.waited.desc())
    best = (g.c.depth.desc(), g.c.ready.desc(), g.c.checkpoint_waited.desc(), g.c.id)
    # Work in flight cannot fill a partial batch of roots; if held back, it would need its checkpoint loaded again.
    enough = or_(full, and_(g.c.ready >= 1, g.c.loaded == 0, g.c.depth == 0)) if wish.full_only else g.c.ready >= 1
    if wish.max_wait_s is None:
        chosen = select(g.c.id, g.c.checkpoint_digest, g.c.ready, literal(0).label("out_of_turn"))
        return chosen.where(enough).order_by(*turn, *best)
    overdue = g.c.checkpoint_waited > wish.max_wait_s
    # Ordered by wait x weight, each overdue checkpoint gets a share in proportion to its weight.
    urgency = case((overdue, g.c.checkpoint_waited / (g.c.priority + EQUALISER)), else_=0.0)
    chosen = select(g.c.id, g.c.checkpoint_digest, g.c.ready, case((overdue, 1), else_=0).label("out_of_turn"))
    return chosen.where(or_(enough, and_(overdue, g.c.ready >= 1))).order_by(urgency.desc(), *turn, *best)


def _insert_lease(connection: Connection, lease_id: str, worker_id: str, group_id: int, ttl_s: float) -> None:
    times = {"created_at": now_s(), "expires_at": now_s() + ttl_s}
    connection.execute(insert(lease).values(id=lease_id, worker_id=worker_id, group_id=group_id, **times))


def _claim(
    connection: Connection, group_id: int, lease_id: str, limit: int, cursor: Cursor, *, alone_too: bool
) -> Sequence[Any]:
    """Claim neighbouring jobs first; a job whose lease once expired is claimed only by itself."""
    for alone, count in ((False, limit), (True, 1))[: 2 if alone_too else 1]:
        after = None if alone else cursor.after.get(group_id)
        picked = pick(group_id, count, alone=alone, after=after).with_for_update(skip_locked=True).cte("picked")
        claim = (
            update(job)
            .where(job.c.id.in_(select(picked.c.id)))
            .values(status=LEASED, lease_id=lease_id, attempt=job.c.attempt + 1)
            .returning(job)
        )
        rows = sorted(connection.execute(claim).all(), key=lambda row: (row.priority, row.id))
        if rows:
            if not alone:
                cursor.after[group_id] = (rows[-1].priority, rows[-1].id)
            return rows
    return ()


def pick(group_id: int, limit: int, *, alone: bool, after: tuple[int, int] | None = None) -> Select[int]:
    """Select the next ready jobs of a group, in the order of ``ix_job_ready``."""
    of_group = select(job.c.id).where(job.c.group_id == group_id, job.c.status == READY, job.c.alone.is_(alone))
    if after is not None:
        of_group = of_group.where(tuple_(job.c.priority, job.c.id) > tuple_(*after))
    return of_group.order_by(job.c.priority, job.c.id).limit(limit)


def _insert_attempts(connection: Connection, rows: Iterable[Any], lease_id: str, worker_id: str) -> None:
    connection.execute(
        insert(attempt).values(lease_id=lease_id, worker_id=worker_id, started_at=now_s()),
        [{"job_id": row.id, "number": row.attempt, "fingerprint": row.fingerprint} for row in rows],
    )


def _leased_jobs(connection: Connection, rows: Sequence[Any]) -> tuple[LeasedJob, ...]:
    parents = _parent_images(connection, [row.id for row in rows])
    owner = connection.execute(
        select(campaign.c.team, campaign.c.name, work_group.c.rules)
        .join(campaign, campaign.c.id == work_group.c.campaign_id)
        .where(work_group.c.id == rows[0].group_id)
    ).one()
    rules = DeliveryRules.from_document(owner.rules)
    return tuple(
        LeasedJob(
            id=row.id,
            attempt=row.attempt,
            max_attempts=row.max_attempts,
            team=owner.team,
            campaign=owner.name,
            edition=row.edition,
            stage=row.stage,
            row_key=row.row_key,
            variables=row.variables,
            seed=row.seed,
            identity=row.identity,
            fingerprint=row.fingerprint,
            request=request_from_document(row.request),
            parents=parents.get(row.id, ()),
            rules=rules,
            private=row.subject is not None,
        )
        for row in rows
    )


def _parent_images(connection: Connection, job_ids: Collection[int]) -> dict[int, tuple[ParentImage, ...]]:
    parent = job.alias("parent")
    names = ("key", "sha256", "pixels_sha256", "fingerprint", "sidecar_key", "sidecar_sha256")
    statement = (
        select(job_parent.c.job_id, parent.c.stage, *(image.c[name] for name in names))
        .join(parent, parent.c.id == job_parent.c.parent_id)
        .join(image, and_(image.c.job_id == parent.c.id, image.c.fingerprint == parent.c.fingerprint))
        .where(job_parent.c.job_id.in_(job_ids))
    )
    found: dict[int, tuple[ParentImage, ...]] = {}
    for row in connection.execute(statement).mappings():
        fields = dict(row)
        owner = fields.pop("job_id")
        found[owner] = (*found.get(owner, ()), ParentImage(**fields))
    return found


def heartbeat(connection: Connection, lease_ids: Collection[str], *, ttl_s: float) -> frozenset[str]:
    """Extend the leases that are still open, in database time; return their ids. The others are lost."""
    # Every statement that locks several leases uses one order, so that no two of them deadlock.
    mine = select(lease.c.id).where(lease.c.id.in_(lease_ids), lease.c.closed_at.is_(None))
    locked = mine.order_by(lease.c.id).with_for_update().cte("locked")
    statement = (
        update(lease)
        .where(lease.c.id.in_(select(locked.c.id)))
        .values(expires_at=now_s() + ttl_s)
        .returning(lease.c.id)
    )
    return frozenset(connection.execute(statement).scalars())


@dataclass(frozen=True, slots=True)
class LeaseState:
    """State of a lease, checked before a batch begins.

    ``active`` says if its campaign is active; ``left_s`` is the lease's remaining seconds, None if it was closed.
    """

    active: bool
    left_s: float | None


def lease_state(connection: Connection, lease_id: str) -> LeaseState:
    """Read a lease's state without locks, so that the device does not wait for any writer."""
    left_s = case((lease.c.closed_at.is_(None), lease.c.expires_at - now_s()))
    asked = (
        select(campaign.c.status, left_s.label("left_s"))
        .join_from(lease, work_group, work_group.c.id == lease.c.group_id)
        .join(campaign, campaign.c.id == work_group.c.campaign_id)
        .where(lease.c.id == lease_id)
    )
    row = connection.execute(asked).one()
    return LeaseState(active=row.status == "active", left_s=row.left_s)


def close_lease(connection: Connection, lease_id: str) -> None:
    """Close a lease; one with an unfinished job stays open until it expires."""
    unfinished = exists().where(job.c.lease_id == lease_id, job.c.status == LEASED)
    mine = and_(lease.c.id == lease_id, lease.c.closed_at.is_(None))
    connection.execute(update(lease).where(mine, ~unfinished).values(closed_at=now_s()))


def complete(tx: Transaction, *, lease_id: str, leased: LeasedJob, stored: StoredImage, charge: Charge) -> bool:
    """Record the picture; if the lease was lost meanwhile, write nothing and return False."""
    share_campaigns(tx.connection, job.c.id == leased.id)
    row = tx.connection.execute(
        update(job)
        .where(_still_ours(lease_id, leased.id), job.c.fingerprint == leased.fingerprint)
        .values(status="succeeded", lease_id=null(), error_kind=null(), error=null(), finished_at=now_s())
        .returning(job.c.campaign_id, job.c.group_id, job.c.salt, job.c.identity, job.c.request, job.c.subject)
    ).first()
    if row is None:
        return False
    fields = {name: getattr(stored, name) for name in StoredImage.__dataclass_fields__}
    tx.connection.execute(
        insert(image).values(
            job_id=leased.id,
            attempt=leased.attempt,
            fingerprint=leased.fingerprint,
            worker_id=charge.worker_id,
            created_at=now_s(),
            **fields,
            **(similar_images.looks(stored.scores) if stored.reused_from is None else {}),
        )
    )
    _end_attempt(tx.connection, leased.id, lease_id, "succeeded", gpu_seconds=charge.gpu_seconds, cost=charge.cost)
    spent = None
    if stored.reused_from is None:
        spent = budgets.spend(tx.connection, row.campaign_id, row.group_id, charge, size_bytes=stored.size_bytes)
    _count_down_children(tx.connection, leased.id)
    tx.record(
        Event.JOB_SUCCEEDED,
        f"job:{leased.id}",
        lease=lease_id,
        attempt=leased.attempt,
        identity=row.identity,
        fingerprint=leased.fingerprint,
        commitment=commitment(row.salt, row.request),
        worker=charge.worker_id,
        image=told_of(fields, row.subject),
        spent=spent,
    )
    return True


def recorded(connection: Connection, *, lease_id: str, leased: LeasedJob) -> StoredImage | None:
    """Return the picture that :func:`complete` recorded for this job under this lease, or None."""
    names = StoredImage.__dataclass_fields__
    ours = and_(attempt.c.job_id == leased.id, attempt.c.lease_id == lease_id, attempt.c.outcome == "succeeded")
    found = connection.execute(
        select(*(image.c[name] for name in names))
        .join(attempt, and_(attempt.c.job_id == image.c.job_id, attempt.c.fingerprint == image.c.fingerprint))
        .where(ours, image.c.fingerprint == leased.fingerprint, image.c.attempt == leased.attempt)
    ).mappings()
    row = found.first()
    return None if row is None else StoredImage(**row)


def told_of(fields: Json, subject: str | None) -> Json:
    """Return a picture's fields for the audit log, without the scores of a subject's picture.

    The log is kept for ever, and the perceptual hash would let a subject's picture be recognised.
    """
    return fields if subject is None else {name: value for name, value in fields.items() if name != "scores"}


def fail(
    tx: Transaction,
    *,
    lease_id: str,
    leased: LeasedJob,
    status: Status,
    error_kind: str,
    error: str,
    charge: Charge,
    backoff_s: float = 0.0,
) -> bool:
    """End an attempt with an error; return False if the lease was lost.

    The job becomes ``failed`` for good, ``blocked`` if the error is a policy's rule, or ``waiting`` for a retry after
    ``backoff_s``.
    """
    share_campaigns(tx.connection, job.c.id == leased.id)
    again = status is Status.WAITING
    row = tx.connection.execute(
        update(job)
        .where(_still_ours(lease_id, leased.id))
        .values(
            status=str(status),
            lease_id=null(),
            error_kind=error_kind,
            error=error,
            not_before=(now_s() + backoff_s) if again else null(),
            finished_at=null() if again else now_s(),
        )
        .returning(job.c.campaign_id, job.c.group_id)
    ).first()
    if row is None:
        return False
    wrong = {"error_kind": error_kind, "error": error}
    spent = {"gpu_seconds": charge.gpu_seconds, "cost": charge.cost}
    _end_attempt(tx.connection, leased.id, lease_id, "failed", **wrong, **spent)
    about: Json = {"lease": lease_id, "attempt": leased.attempt, "fingerprint": leased.fingerprint, "spent": None}
    about["worker"] = charge.worker_id
    if charge.gpu_seconds:
        about["spent"] = budgets.spend(tx.connection, row.campaign_id, row.group_id, charge, size_bytes=None)
    event = Event.JOB_DEFERRED if again else Event.JOB_FAILED
    about |= {"rule": error} if status is Status.BLOCKED else {}
    tx.record(event, f"job:{leased.id}", error_kind=error_kind, **about)
    if not again:
        skip_descendants(tx, [leased.id], f"job:{leased.id}")
    return True


def release(tx: Transaction, *, lease_id: str) -> int:
    """Return a lease's unfinished jobs to their previous state; their attempt does not count."""
    # The campaign's lock first, then the lease's row: cancel and submit take them in this order too.
    share_campaigns(tx.connection, and_(job.c.lease_id == lease_id, job.c.status == LEASED))
    mine = and_(lease.c.id == lease_id, lease.c.closed_at.is_(None))
    tx.connection.execute(update(lease).where(mine).values(closed_at=now_s()))
    held = _held_jobs(tx.connection, [lease_id])
    _end_attempts(tx.connection, [lease_id], "released")
    if not held:
        return 0
    _reopen(tx.connection, held, attempt=job.c.attempt - 1)
    tx.record(Event.LEASE_RELEASED, f"lease:{lease_id}", jobs=[[row.id, row.attempt - 1] for row in held])
    return len(held)


def reap(tx: Transaction, *, lease_ids: Collection[str] | None = None) -> int:
    """Close expired leases (or the given ones) and make their jobs ready again, to be leased alone.

    Only an attempt made alone counts, and the last of those fails the job. So a job that kills its worker is found, and
    its neighbours lose no attempts.
    """
    closed = _close_dead(tx.connection, lease_ids)
    if not closed:
        return 0
    held = _held_jobs(tx.connection, closed)
    _end_attempts(tx.connection, closed, "expired")
    exhausted = [row for row in held if row.alone and row.attempt >= row.max_attempts]
    again = [row for row in held if not row.alone or row.attempt < row.max_attempts]
    # An attempt made together with others is given back; one made alone counts.
    _reopen(tx.connection, again, attempt=case((job.c.alone, job.c.attempt), else_=job.c.attempt - 1), alone=true())
    for lease_id in closed:
        jobs = [[row.id, row.attempt - (not row.alone)] for row in again if row.lease_id == lease_id]
        tx.record(Event.LEASE_EXPIRED, f"lease:{lease_id}", jobs=jobs)
    _exhaust(tx, exhausted)
    return len(held)


def _close_dead(connection: Connection, lease_ids: Collection[str] | None) -> list[str]:
    dead = lease.c.id.in_(lease_ids) if lease_ids is not None else lease.c.expires_at < now_s()
    still_dead = and_(lease.c.closed_at.is_(None), dead)
    found = select(lease.c.id).where(still_dead).order_by(lease.c.expires_at).limit(MOST_REAPED)
    candidates = list(connection.execute(found).scalars())
    if not candidates:
        return []
    # The campaign's lock first, then the lease's row: cancel and submit take them in this order too.
    share_campaigns(connection, and_(job.c.lease_id.in_(candidates), job.c.status == LEASED))
    mine = select(lease.c.id).where(lease.c.id.in_(candidates), still_dead)
    picked = mine.order_by(lease.c.id).with_for_update(skip_locked=True).cte("picked")
    close = update(lease).where(lease.c.id.in_(select(picked.c.id))).values(closed_at=now_s()).returning(lease.c.id)
    return list(connection.execute(close).scalars())


def _held_jobs(connection: Connection, lease_ids: Collection[str]) -> Sequence[Any]:
    """Lock and return the unfinished jobs of these leases."""
    ours = and_(job.c.lease_id.in_(lease_ids), job.c.status == LEASED)
    share_campaigns(connection, ours)
    columns = (job.c.id, job.c.lease_id, job.c.attempt, job.c.max_attempts, job.c.alone, job.c.fingerprint)
    return connection.execute(select(*columns).where(ours).order_by(job.c.id).with_for_update()).all()


def _reopen(connection: Connection, held: Sequence[Any], **values: Any) -> None:
    ids = [row.id for row in held]
    if ids:
        connection.execute(update(job).where(job.c.id.in_(ids)).values(status=READY, lease_id=null(), **values))


def _exhaust(tx: Transaction, held: Sequence[Any]) -> None:
    ids = [row.id for row in held]
    if not ids:
        return
    lost = "the worker that ran this job alone was lost at every attempt"
    values = {"status": "failed", "lease_id": null(), "finished_at": now_s(), "error_kind": "WorkerLost", "error": lost}
    tx.connection.execute(update(job).where(job.c.id.in_(ids)).values(**values))
    for row in held:
        about = {"lease": row.lease_id, "attempt": row.attempt, "fingerprint": row.fingerprint, "spent": None}
        tx.record(Event.JOB_FAILED, f"job:{row.id}", error_kind="WorkerLost", **about)
    skip_descendants(tx, ids, f"lease:{held[0].lease_id}")


def promote(connection: Connection) -> int:
    """Make jobs ready again when their back-off is over; skip locked ones until the next call."""
    due = (
        select(job.c.id)
        .where(job.c.status == WAITING, job.c.not_before.is_not(None), job.c.not_before <= now_s())
        .order_by(job.c.not_before)
        .limit(MOST_PROMOTED)
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    ready = update(job).where(job.c.id.in_(select(due.c.id))).values(status=READY, not_before=null())
    return len(connection.execute(ready.returning(job.c.id)).all())


def _still_ours(lease_id: str, job_id: int) -> ColumnElement[bool]:
    """Return the fencing condition: a worker whose lease was closed matches no row."""
    return and_(job.c.id == job_id, job.c.lease_id == lease_id, job.c.status == LEASED)


def _end_attempt(connection: Connection, job_id: int, lease_id: str, outcome: str, **more: Any) -> None:
    mine = and_(attempt.c.job_id == job_id, attempt.c.lease_id == lease_id)
    connection.execute(update(attempt).where(mine).values(finished_at=now_s(), outcome=outcome, **more))


def _end_attempts(connection: Connection, lease_ids: Collection[str], outcome: str) -> None:
    still_open = and_(attempt.c.lease_id.in_(lease_ids), attempt.c.outcome.is_(None))
    connection.execute(update(attempt).where(still_open).values(finished_at=now_s(), outcome=outcome))


def _count_down_children(connection: Connection, parent_id: int) -> None:
    children = (
        select(job.c.id)
        .join(job_parent, job_parent.c.job_id == job.c.id)
        .where(job_parent.c.parent_id == parent_id, job.c.status == WAITING, job.c.parents_left > 0)
        .order_by(job.c.id)
        .with_for_update(of=job)
        .cte("children")
    )
    connection.execute(
        update(job)
        .where(job.c.id.in_(select(children.c.id)))
        .values(
            parents_left=job.c.parents_left - 1,
            status=case((job.c.parents_left == 1, READY), else_=job.c.status),
        )
    )


def skip_descendants(tx: Transaction, of: Collection[int] | Select[int], subject: str) -> None:
    """Skip the descendants of failed jobs, because they can no longer be made."""
    below = descendants(of)
    stranded = (
        select(job.c.id)
        .where(job.c.id.in_(select(below.c.id)), job.c.status.in_(("waiting", "ready")))
        .order_by(job.c.id)
        .with_for_update()
        .cte("stranded")
    )
    skip = update(job).where(job.c.id.in_(select(stranded.c.id))).values(status="skipped", **SKIPPED)
    rows = sorted(tx.connection.execute(skip.returning(job.c.id)).scalars())
    if rows:
        tx.record(Event.JOBS_SKIPPED, subject, jobs=rows)


def descendants(of: Collection[int] | Select[int]) -> CTE:
    """Build a recursive table of the ids of all descendants of the given jobs."""
    below = select(job_parent.c.job_id.label("id")).where(job_parent.c.parent_id.in_(of)).cte("below", recursive=True)
    deeper = select(job_parent.c.job_id).join(below, job_parent.c.parent_id == below.c.id)
    return below.union(deeper)


def abandon(connection: Connection, groups: Select[int]) -> None:
    """End these groups' attempts whose job lost its lease, and close the leases left without a job.

    Call it after the update of the jobs, never before. A lease that commits while that update waits for its rows is not
    in the snapshot of any earlier statement. A worker whose lease was closed skips its next forward pass.
    """
    leases = select(lease.c.id).where(lease.c.closed_at.is_(None), lease.c.group_id.in_(groups))
    lease_ids = list(connection.execute(leases).scalars())
    if not lease_ids:
        return
    lost = and_(attempt.c.lease_id.in_(lease_ids), ~held_by_lease())
    ended = {"finished_at": now_s(), "outcome": "abandoned"}
    connection.execute(update(attempt).where(attempt.c.outcome.is_(None), lost).values(**ended))
    holding = select(job.c.lease_id).where(job.c.lease_id.in_(lease_ids), job.c.status == LEASED)
    empty = and_(lease.c.id.in_(lease_ids), lease.c.closed_at.is_(None), lease.c.id.not_in(holding))
    locked = select(lease.c.id).where(empty).order_by(lease.c.id).with_for_update().cte("locked")
    connection.execute(update(lease).where(lease.c.id.in_(select(locked.c.id))).values(closed_at=now_s()))


def abandon_in(connection: Connection, campaign_id: int) -> None:
    """Call :func:`abandon` for all groups of a campaign."""
    abandon(connection, select(work_group.c.id).where(work_group.c.campaign_id == campaign_id))


def held_by_lease() -> ColumnElement[bool]:
    """Return the condition that an attempt's job is leased under the attempt's lease."""
    same = (job.c.id == attempt.c.job_id, job.c.lease_id == attempt.c.lease_id)
    return exists().where(*same, job.c.status == LEASED).correlate(attempt)


def open_leases(connection: Connection, worker_ids: Collection[str]) -> list[str]:
    """List leases that the given workers still hold."""
    held = select(lease.c.id).where(lease.c.closed_at.is_(None), lease.c.worker_id.in_(worker_ids))
    return list(connection.execute(held).scalars())


def commitment(salt: str, request: Json) -> str:
    """Hash a request with its salt for audit events: not readable, and meaningless once the salt is deleted."""
    return digest([salt, request])
