"""Leases: choose the next ready jobs for a worker, lease them, renew and close leases."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    Connection,
    Row,
    Select,
    Subquery,
    and_,
    case,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    tuple_,
    update,
)

from sdpipeline.db.audit import Event, Transaction
from sdpipeline.db.connection import now_s
from sdpipeline.db.tables import (
    LEASED,
    READY,
    attempt,
    campaign,
    campaign_version,
    image,
    job,
    job_parent,
    lease,
    work_group,
)
from sdpipeline.domain import request_from_document
from sdpipeline.jobs import DeliveryRules, Lease, LeasedJob, ParentImage

BELOW_ANY_PRIORITY = -(2**15) - 1
"""Less than any priority, which is a SMALLINT."""

CURSOR_TTL_S = 30.0
PARTIAL_BATCH_CURSOR_TTL_S = 1.0
MAX_SCAN_SHARE = 0.02
"""Limits of a :class:`Cursor`: its age, its age without a full batch, and the fraction of time spent on full scans."""

PRIORITY_OFFSET = 100.0
"""Added to a priority number to make it a weight: the highest waits at most eleven times as long as 0."""

LEAD_TIME_DECAY = 0.8
"""Fraction of the lead time that is kept when a lease begins sooner."""


@dataclass(slots=True)
class AgingPolicy:
    """Aging policy: how long ready jobs of a checkpoint may wait before they override priority.

    A checkpoint that waited longer goes first, but not twice in a row at one worker. So many overdue checkpoints take
    at most half of a worker from the campaign that is next in order.

    A lease begins ``lead_s`` after it was taken, behind earlier leases. The last of ``waiting_checkpoints`` begins
    after one lease of each and the normal leases in between. Therefore all of them go first that much sooner.
    """

    max_wait_s: float = math.inf
    last_was_overdue: bool = False
    lead_s: float = 0.0
    waiting_checkpoints: int = 0

    @property
    def overdue_after_s(self) -> float:
        """Seconds without a lease after which a checkpoint goes first, so that it begins within ``max_wait_s``.

        It is at least half of ``max_wait_s``, or devices would do little else than load.
        """
        return self.max_wait_s - min(2 * self.lead_s * self.waiting_checkpoints, self.max_wait_s / 2)

    def record_lead(self, after_s: float) -> None:
        """Record the seconds from taking a lease to its first batch; one short delay lowers the estimate slowly."""
        self.lead_s = max(after_s, self.lead_s * LEAD_TIME_DECAY)


@dataclass(slots=True)
class Cursor:
    """Position of a worker's last ready jobs in each group: a hint that keeps the index scan short.

    While a transaction holds an old snapshot, the index entries of leased jobs stay and every lease would read them
    again. Jobs that become ready behind the cursor are seen after it expires. That is after ``CURSOR_TTL_S``, or after
    ``PARTIAL_BATCH_CURSOR_TTL_S`` if it finds no full batch. It is later if full scans would take more than
    ``MAX_SCAN_SHARE`` of the time.
    """

    aging: AgingPolicy = field(default_factory=AgingPolicy)
    after: dict[int, tuple[int, int]] = field(default_factory=dict)
    scanned_at: float = field(default_factory=time.monotonic)
    scan_s: float = 0.0

    def expire(self, *, older_than_s: float) -> bool:
        """Clear the cursor for a full scan, unless that was done recently; return True if cleared."""
        if not self.after or time.monotonic() - self.scanned_at < max(older_than_s, self.scan_s / MAX_SCAN_SHARE):
            return False
        self.after.clear()
        return True


@dataclass(frozen=True, slots=True)
class LeaseState:
    """State of a lease, checked before a batch begins.

    ``active`` says if its campaign is active; ``left_s`` is the lease's remaining seconds, None if it was closed.
    """

    active: bool
    left_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRequest:
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
    aging = cursor.aging
    cursor.expire(older_than_s=CURSOR_TTL_S)
    bounded = not aging.last_was_overdue and aging.max_wait_s < math.inf
    request = LeaseRequest(
        limit=limit,
        campaign_id=campaign_id,
        resident=resident,
        full_only=full_only,
        max_wait_s=aging.overdue_after_s if bounded else None,
    )
    groups = _ready_groups(tx.connection, request, cursor)
    if not (groups and groups[0].ready >= limit) and cursor.expire(older_than_s=PARTIAL_BATCH_CURSOR_TTL_S):
        groups = _ready_groups(tx.connection, request, cursor)
    aging.last_was_overdue = False
    aging.waiting_checkpoints = len({group.checkpoint_digest for group in groups}.difference(resident))
    for group in groups:
        if taken := _lease_group(tx, group, request, cursor, worker_id=worker_id, ttl_s=ttl_s):
            aging.last_was_overdue = bool(group.out_of_turn)
            return taken
    return None


def _lease_group(
    tx: Transaction, group: Row[Any], request: LeaseRequest, cursor: Cursor, *, worker_id: str, ttl_s: float
) -> Lease | None:
    """Lease ready jobs of this group, or None if other workers claimed all of them meanwhile."""
    lease_id = secrets.token_hex(16)
    _insert_lease(tx.connection, lease_id, worker_id, group.id, ttl_s)
    # If a possible poison job ran while other work is in flight, one could take the other down.
    alone_too = not request.full_only or group.ready >= request.limit or bool(group.out_of_turn)
    rows = _claim(tx.connection, group.id, lease_id, request.limit, cursor, alone_too=alone_too)
    if not rows:
        tx.connection.execute(lease.delete().where(lease.c.id == lease_id))
        return None
    _insert_attempts(tx.connection, rows, lease_id, worker_id)
    tx.record(Event.LEASE_TAKEN, f"lease:{lease_id}", worker=worker_id, jobs=[[r.id, r.attempt] for r in rows])
    jobs = _leased_jobs(tx.connection, rows)
    return Lease(id=lease_id, group_id=group.id, checkpoint_digest=group.checkpoint_digest, jobs=jobs)


def _ready_groups(connection: Connection, request: LeaseRequest, cursor: Cursor) -> Sequence[Row[Any]]:
    """List groups with ready jobs, best first; counting stops at the limit, so queue depth does not matter."""
    statement = _by_precedence(_count_ready_jobs(request, cursor), request)
    started = time.monotonic()
    found = connection.execute(statement).all()
    if not cursor.after:
        cursor.scanned_at = time.monotonic()
        cursor.scan_s = cursor.scanned_at - started
    return found


def _count_ready_jobs(request: LeaseRequest, cursor: Cursor) -> Subquery:
    """Select every group of an active campaign with its number of ready jobs and the start of its wait."""
    of_group = and_(job.c.group_id == work_group.c.id, job.c.status == READY)
    if cursor.after:
        # One value per group, in the order of the index.
        after = [
            case({n: at[k] for n, at in cursor.after.items()}, value=work_group.c.id, else_=BELOW_ANY_PRIORITY)
            for k in (0, 1)
        ]
        of_group = and_(of_group, tuple_(job.c.priority, job.c.id) > tuple_(*after))
    first_few = select(literal(1).label("one")).where(of_group).correlate(work_group).limit(request.limit).subquery()
    ready = select(func.count()).select_from(first_few).scalar_subquery()
    resident = list(request.resident)
    loaded = case((work_group.c.checkpoint_digest.in_(resident), 0), else_=1) if resident else literal(1)
    leased_at = select(func.max(lease.c.created_at)).where(lease.c.group_id == work_group.c.id).scalar_subquery()
    counted = (
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
    if request.campaign_id is not None:
        counted = counted.where(campaign.c.id == request.campaign_id)
    return counted.subquery()


def _by_precedence(counted: Subquery, request: LeaseRequest) -> Select[Any]:
    """Order the groups to try; a campaign waits since its last lease, or since it was published.

    A resident checkpoint's work is finished, including the last partial batch, before another checkpoint is loaded,
    because loading takes longer than most batches. Each checkpoint of a campaign ages separately, so that its wait is
    bounded.
    """
    since = case((counted.c.leased_at > counted.c.published_at, counted.c.leased_at), else_=counted.c.published_at)
    now = select(now_s()).scalar_subquery()  # PostgreSQL would read its clock again for each group
    of_checkpoint = [counted.c.campaign_id, counted.c.checkpoint_digest]
    g = select(
        *counted.c,
        (now - func.max(since).over(partition_by=counted.c.campaign_id)).label("waited"),
        (now - func.max(since).over(partition_by=of_checkpoint)).label("checkpoint_waited"),
    ).subquery()
    full = g.c.ready >= request.limit
    turn = (g.c.priority, g.c.loaded, case((full, 0), else_=1), g.c.waited.desc())
    best = (g.c.depth.desc(), g.c.ready.desc(), g.c.checkpoint_waited.desc(), g.c.id)
    # Work in flight cannot fill a partial batch of roots; if held back, it would need its checkpoint loaded again.
    enough = or_(full, and_(g.c.ready >= 1, g.c.loaded == 0, g.c.depth == 0)) if request.full_only else g.c.ready >= 1
    if request.max_wait_s is None:
        chosen = select(g.c.id, g.c.checkpoint_digest, g.c.ready, literal(0).label("out_of_turn"))
        return chosen.where(enough).order_by(*turn, *best)
    overdue = g.c.checkpoint_waited > request.max_wait_s
    # Ordered by wait x weight, each overdue checkpoint gets a share in proportion to its weight.
    urgency = case((overdue, g.c.checkpoint_waited / (g.c.priority + PRIORITY_OFFSET)), else_=0.0)
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
        picked = (
            next_ready_jobs(group_id, count, alone=alone, after=after).with_for_update(skip_locked=True).cte("picked")
        )
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


def next_ready_jobs(group_id: int, limit: int, *, alone: bool, after: tuple[int, int] | None = None) -> Select[int]:
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


def renew(connection: Connection, lease_ids: Collection[str], *, ttl_s: float) -> frozenset[str]:
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


def open_leases(connection: Connection, worker_ids: Collection[str]) -> list[str]:
    """List leases that the given workers still hold."""
    held = select(lease.c.id).where(lease.c.closed_at.is_(None), lease.c.worker_id.in_(worker_ids))
    return list(connection.execute(held).scalars())


def close_lease(connection: Connection, lease_id: str) -> None:
    """Close a lease; one with an unfinished job stays open until it expires."""
    unfinished = exists().where(job.c.lease_id == lease_id, job.c.status == LEASED)
    mine = and_(lease.c.id == lease_id, lease.c.closed_at.is_(None))
    connection.execute(update(lease).where(mine, ~unfinished).values(closed_at=now_s()))
