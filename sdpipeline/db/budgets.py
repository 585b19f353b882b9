"""Campaign budgets: record spending, begin chains as far as the budget allows, and pause a campaign that spent it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, case, exists, func, null, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from sdpipeline.db.audit import Event, Transaction
from sdpipeline.db.cost_history import average
from sdpipeline.db.locks import share_if_free
from sdpipeline.db.tables import LEASED, READY, WAITING, campaign, job, spending, work_group
from sdpipeline.domain import Json

_UNFINISHED = and_(job.c.chain.is_not(None), job.c.status.in_((WAITING, READY, LEASED)))
LIMITS = {"max_images": "images", "max_gpu_seconds": "gpu_seconds", "max_cost": "cost"}
"""A budget's keys and the amount that each of them limits."""

Amounts = Mapping[str, float]
"""Pictures, GPU-seconds and cost, by the names of ``spending``'s columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """Cost of an attempt: its worker, seconds of the device, and their price."""

    worker_id: str
    gpu_seconds: float = 0.0
    cost: float = 0.0


def set_terms(tx: Transaction, campaign_id: int, *, budget: Json | None, priority: int) -> None:
    """Set the newest version's budget and priority; resume a campaign that paused itself."""
    this = campaign.c.id == campaign_id
    values = {"budget": budget if budget is not None else null(), "priority": priority}
    tx.connection.execute(update(campaign).where(this).values(**values))
    paused = and_(this, campaign.c.paused_because.is_not(None))
    again = update(campaign).where(paused).values(status="active", paused_because=null())
    if tx.connection.execute(again.returning(campaign.c.id)).first():
        tx.record(Event.CAMPAIGN_RESUMED, f"campaign:{campaign_id}", reason="submitted")


def start_over(connection: Connection, campaign_id: int) -> None:
    """Reconsider every chain, because some are to be made again; hold root jobs that are not leased."""
    connection.execute(update(campaign).where(campaign.c.id == campaign_id).values(admitted=0))
    roots = and_(job.c.campaign_id == campaign_id, job.c.chain.is_not(None), job.c.depth == 0)
    connection.execute(update(job).where(roots, job.c.status == READY).values(status="waiting"))


def let_go(connection: Connection, campaign_id: int) -> None:
    """Release all held jobs of a campaign that has no budget (any more)."""
    connection.execute(update(job).where(job.c.campaign_id == campaign_id, _held()).values(status="ready"))
    numbered = and_(job.c.campaign_id == campaign_id, job.c.chain.is_not(None))
    connection.execute(update(job).where(numbered).values(chain=null()))


def spend(connection: Connection, campaign_id: int, group_id: int, charge: Charge, *, size_bytes: int | None) -> Json:
    """Add an attempt to the cost of a campaign's group; return the amounts for the attempt's audit event.

    ``size_bytes`` is the size of its picture, None if it made none.
    """
    amounts: dict[str, float] = {"images": int(size_bytes is not None), "size_bytes": size_bytes or 0}
    amounts |= {"gpu_seconds": charge.gpu_seconds, "cost": charge.cost}
    row = {"campaign_id": campaign_id, "group_id": group_id, "worker_id": charge.worker_id} | amounts
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    add = {name: spending.c[name] + value for name, value in amounts.items()}
    keys = [spending.c.campaign_id, spending.c.group_id, spending.c.worker_id]
    connection.execute(dialect.insert(spending).values(**row).on_conflict_do_update(index_elements=keys, set_=add))
    return {"campaign": campaign_id, "group": group_id} | amounts


def spent(connection: Connection, campaign_id: int) -> Amounts:
    """Return a campaign's cost so far, including failed attempts."""
    sums = [func.coalesce(func.sum(spending.c[name]), 0).label(name) for name in LIMITS.values()]
    row = connection.execute(select(*sums).where(spending.c.campaign_id == campaign_id)).one()
    return {name: float(getattr(row, name)) for name in LIMITS.values()}


def admit(tx: Transaction, *, wave: int, gpu_second_cost: float = 0.0, campaign_id: int | None = None) -> None:
    """Begin chains of campaigns with a budget, at most ``wave`` ahead of the leases; pause those that spent it.

    A chain is begun only if the budget also covers the rest of all chains begun before, so that it buys finished
    pictures and not only drafts. The cost of stages without any picture yet is learned from one wave.
    ``gpu_second_cost`` is the deployment's price.
    """
    to_begin = exists().where(job.c.campaign_id == campaign.c.id, _UNFINISHED, job.c.chain >= campaign.c.admitted)
    mine = (campaign.c.budget.is_not(None), campaign.c.status == "active", to_begin)
    chosen = select(campaign.c.id, campaign.c.budget, campaign.c.admitted).where(*mine)
    if campaign_id is not None:
        chosen = chosen.where(campaign.c.id == campaign_id)
    # Do not block completions: their first row of spending refers to the campaign.
    free = chosen.order_by(campaign.c.id).with_for_update(skip_locked=True, key_share=True)
    for row in tx.connection.execute(free).all():
        # JSON's null is not NULL everywhere. Do not wait for a campaign's exclusive lock while its row is locked here.
        if row.budget is not None and share_if_free(tx.connection, row.id):
            _admit(tx, row, wave, gpu_second_cost)


def _admit(tx: Transaction, row: Any, wave: int, gpu_second_cost: float) -> None:
    connection, budget = tx.connection, row.budget
    of_this = and_(job.c.campaign_id == row.id, _UNFINISHED)
    running = _running(connection, row.id, row.admitted)
    begun = _left(connection, and_(of_this, job.c.chain < row.admitted))
    if running:
        of_running = and_(of_this, job.c.chain.in_(running))
        connection.execute(update(job).where(of_running, _held()).values(status="ready"))
        begun += _left(connection, of_running)
    if sum(roots for _, _, roots in begun) >= wave:
        return
    chains = _next_chains(connection, and_(of_this, job.c.chain >= row.admitted, job.c.chain.not_in(running)), wave)
    if not chains:
        return
    stages = {stage for counts in chains.values() for stage in counts} | {stage for stage, _, _ in begun}
    seconds = {stage: _seconds(connection, row.id, stage) for stage in sorted(stages)}
    if begun and None in seconds.values() and not budget.keys() <= {"max_images"}:
        return
    prices = {stage: _price_of_one(each or 0.0, gpu_second_cost) for stage, each in seconds.items()}
    used = _sum(spent(connection, row.id), *(_times(prices[stage], count) for stage, count, _ in begun))
    upto = None
    for chain, counts in chains.items():
        used = _sum(used, *(_times(prices[stage], count) for stage, count in counts.items()))
        if any(used[LIMITS[name]] > limit for name, limit in budget.items()):
            break
        upto = chain + 1
    if upto is not None:
        connection.execute(update(campaign).where(campaign.c.id == row.id).values(admitted=upto))
        window = job.c.chain.between(row.admitted, upto - 1)
        connection.execute(update(job).where(of_this, window, _held()).values(status="ready"))
    elif not begun:
        _pause(tx, row.id, budget)


def _running(connection: Connection, campaign_id: int, admitted: int) -> list[int]:
    """List chains in progress that a submit or a retry has moved behind others."""
    unfinished = and_(job.c.campaign_id == campaign_id, or_(job.c.status == READY, job.c.status == LEASED))
    # `+ 0` forces the index on the status: few jobs are ready or leased, and any number may be in later chains.
    return sorted(set(connection.execute(select(job.c.chain).where(unfinished, job.c.chain + 0 >= admitted)).scalars()))


def _left(connection: Connection, chosen: ColumnElement[bool]) -> list[tuple[str, int, int]]:
    """Count unfinished jobs by stage, and how many of them are root jobs that are not leased."""
    roots = func.sum(case((and_(job.c.depth == 0, job.c.status != LEASED), 1), else_=0))
    rows = connection.execute(select(job.c.stage, func.count(), roots).where(chosen).group_by(job.c.stage))
    return [(stage, int(count), int(idle)) for stage, count, idle in rows]


def _next_chains(connection: Connection, held: ColumnElement[bool], wave: int) -> dict[int, dict[str, int]]:
    """Count the unfinished jobs of each stage in the next chains."""
    numbers = select(job.c.chain).where(held).distinct().order_by(job.c.chain).limit(wave).subquery()
    counted = (
        select(job.c.chain, job.c.stage, func.count())
        .where(held, job.c.chain.in_(select(numbers.c.chain)))
        .group_by(job.c.chain, job.c.stage)
        .order_by(job.c.chain)
    )
    chains: dict[int, dict[str, int]] = {}
    for chain, stage, count in connection.execute(counted):
        chains.setdefault(chain, {})[stage] = count
    return chains


def _seconds(connection: Connection, campaign_id: int, stage: str) -> float | None:
    """Estimate GPU-seconds of one picture of a stage, from this campaign or else from others' same batch keys."""
    own = and_(work_group.c.campaign_id == campaign_id, work_group.c.stage == stage)
    keys = select(work_group.c.batch_key).where(own).scalar_subquery()
    found = average(connection, own) or average(connection, work_group.c.batch_key.in_(keys))
    return None if found is None else found.gpu_seconds


def _price_of_one(gpu_seconds: float, gpu_second_cost: float) -> Amounts:
    return {"images": 1.0, "gpu_seconds": gpu_seconds, "cost": gpu_seconds * gpu_second_cost}


def _times(amounts: Amounts, count: int) -> Amounts:
    return {name: count * value for name, value in amounts.items()}


def _sum(*parts: Amounts) -> Amounts:
    return {name: sum(part[name] for part in parts) for name in LIMITS.values()}


def _pause(tx: Transaction, campaign_id: int, budget: Json) -> None:
    limits = ", ".join(f"{name} {limit:g}" for name, limit in budget.items())
    why = f"budget: the remainder of {limits} does not cover another chain"
    own = {"status": "paused", "paused_because": why}
    tx.connection.execute(update(campaign).where(campaign.c.id == campaign_id).values(**own))
    tx.record(Event.CAMPAIGN_PAUSED, f"campaign:{campaign_id}", reason="budget", budget=budget)


def _held() -> ColumnElement[bool]:
    """Select jobs that wait for neither parents nor time."""
    return and_(job.c.status == WAITING, job.c.parents_left == 0, job.c.not_before.is_(None))
