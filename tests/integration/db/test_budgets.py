"""Budgets: chains are started within the budget so that it pays for finished pictures; then the campaign pauses."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sqlalchemy import event, select

from sdpipeline.db import budgets, job_control, queries, tables
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database
from sdpipeline.db.locks import lock_campaign
from tests.factories import chains, completed, events, failed, leased, published, statuses, try_lease
from tests.integration.databases import on_postgresql

STAGES = ("draft", "scene", "final")
SECONDS = 0.1
"""GPU seconds of each picture in these tests."""


def budgeted(audit: AuditLog, count: int, **budget: Any) -> int:
    """Submit a campaign of numbered chains of three stages; return its id."""
    jobs = [_numbered(spec, n // len(STAGES)) for n, spec in enumerate(chains(count, *STAGES))]
    return published(audit, jobs, budget=budget).campaign_id


def _numbered(spec: Any, chain: int) -> Any:
    object.__setattr__(spec, "chain", chain)
    return spec


def worked(audit: AuditLog, *, wave: int = 8, price: float = 0.0) -> list[str]:
    """Work as one worker until nothing is ready; return the stages in the order of their leases."""
    order: list[str] = []
    while True:
        with audit.transaction() as tx:
            budgets.admit(tx, wave=wave, gpu_second_cost=price)
        lease = try_lease(audit, limit=wave)
        if lease is None:
            return order
        order.append(lease.jobs[0].stage)
        completed(audit, lease, gpu_second_cost=price)


def made(database: Database) -> Counter[str]:
    return Counter(stage for stage, status in statuses(database, "stage", "status") if status == "succeeded")


def test_a_budget_of_pictures_for_a_third_ends_with_finished_chains(audit: AuditLog, database: Database) -> None:
    budgeted(audit, 30, max_images=30)
    worked(audit)
    assert made(database) == {"draft": 10, "scene": 10, "final": 10}


def test_a_budget_of_seconds_for_a_third_ends_with_finished_chains(audit: AuditLog, database: Database) -> None:
    budgeted(audit, 30, max_gpu_seconds=30 * SECONDS)
    worked(audit)
    found = made(database)
    assert found["draft"] == found["scene"] == found["final"]
    assert 8 <= found["final"] <= 10


def test_a_budget_of_money_buys_as_much_as_its_seconds(audit: AuditLog, database: Database) -> None:
    budgeted(audit, 30, max_cost=30 * SECONDS * 2.0)
    worked(audit, price=2.0)
    assert 8 <= made(database)["final"] <= 10


def test_a_spent_budget_pauses_the_campaign_and_says_so(audit: AuditLog, database: Database) -> None:
    campaign_id = budgeted(audit, 30, max_images=30)
    worked(audit)
    with database.read() as connection:
        progress = queries.progress(connection, campaign_id)
    assert progress.status == "paused"
    assert progress.paused_because is not None
    assert "max_images 30" in progress.paused_because
    paused = [event for event in events(database) if event["event"] == "campaign.paused"]
    assert [event["reason"] for event in paused] == ["budget"]


def test_a_larger_budget_lets_the_campaign_go_on(audit: AuditLog, database: Database) -> None:
    budgeted(audit, 20, max_images=30)
    worked(audit)
    budgeted(audit, 20, max_images=45)
    worked(audit)
    assert made(database) == {"draft": 15, "scene": 15, "final": 15}


def test_without_a_budget_any_more_nothing_is_held(audit: AuditLog, database: Database) -> None:
    budgeted(audit, 20, max_images=3)
    worked(audit)
    published(audit, chains(20, *STAGES))
    worked(audit)
    assert set(statuses(database)) == {"succeeded"}


def test_a_budget_that_covers_all_finishes_all(audit: AuditLog, database: Database) -> None:
    campaign_id = budgeted(audit, 20, max_images=60, max_gpu_seconds=1000)
    worked(audit)
    with database.read() as connection:
        assert queries.progress(connection, campaign_id).status == "finished"


def test_a_budget_smaller_than_one_chain_makes_nothing(audit: AuditLog, database: Database) -> None:
    budgeted(audit, 4, max_images=2)
    assert worked(audit) == []
    assert made(database) == {}


def test_an_unknown_price_is_learned_from_one_wave(audit: AuditLog, database: Database) -> None:
    budgeted(audit, 100, max_gpu_seconds=1000)
    with audit.transaction() as tx:
        budgets.admit(tx, wave=8)
    assert Counter(statuses(database))["ready"] == 8
    completed(audit, leased(audit, limit=8))
    with audit.transaction() as tx:
        budgets.admit(tx, wave=8)
    # The costs of scenes and finals are not known yet.
    assert [stage for stage, status in statuses(database, "stage", "status") if status == "ready"] == ["scene"] * 8


def test_failed_attempts_are_paid_for_too(audit: AuditLog, database: Database) -> None:
    campaign_id = budgeted(audit, 8, max_gpu_seconds=1000)
    with audit.transaction() as tx:
        budgets.admit(tx, wave=8)
    lease = leased(audit)
    charge = budgets.Charge(worker_id="worker-1", gpu_seconds=2.5, cost=0.5)
    failed(audit, lease, lease.jobs[0], charge=charge)
    with database.read() as connection:
        assert budgets.spent(connection, campaign_id) == {"images": 0, "gpu_seconds": 2.5, "cost": 0.5}
        paid = select(tables.attempt.c.gpu_seconds, tables.attempt.c.cost).where(tables.attempt.c.outcome == "failed")
        assert connection.execute(paid).all() == [(2.5, 0.5)]


def test_failed_roots_retried_are_held_until_the_budget_allows(audit: AuditLog, database: Database) -> None:
    campaign_id = budgeted(audit, 4, max_images=12)
    with audit.transaction() as tx:
        budgets.admit(tx, wave=8)
    lease = leased(audit)
    for job in lease.jobs:
        failed(audit, lease, job)
    with audit.transaction() as tx:
        job_control.retry(tx, campaign_id=campaign_id, statuses=["failed"])
    assert try_lease(audit) is None
    worked(audit)
    assert made(database) == {"draft": 4, "scene": 4, "final": 4}


def test_a_campaign_without_a_budget_is_leased_beside_one_that_spent_it(audit: AuditLog, database: Database) -> None:
    budgeted(audit, 4, max_images=2)
    published(audit, chains(4), name="autumn")
    worked(audit)
    assert made(database) == {"draft": 4}


def test_rows_put_in_front_of_what_runs_do_not_overspend(audit: AuditLog, database: Database) -> None:
    budgeted(audit, 30, max_images=24)
    with audit.transaction() as tx:
        budgets.admit(tx, wave=8)
    completed(audit, leased(audit))
    jobs = [_numbered(spec, 100 + n // len(STAGES)) for n, spec in enumerate(chains(30, *STAGES))]
    published(audit, jobs, budget={"max_images": 24})
    worked(audit)
    assert made(database) == {"draft": 8, "scene": 8, "final": 8}


def test_a_budget_that_comes_later_holds_what_nobody_has_leased(audit: AuditLog, database: Database) -> None:
    published(audit, chains(30, *STAGES))
    budgeted(audit, 30, max_images=30)
    worked(audit)
    assert made(database) == {"draft": 10, "scene": 10, "final": 10}


def test_two_workers_get_a_batch_each_where_the_budget_allows(audit: AuditLog) -> None:
    jobs = [_numbered(spec, n) for n, spec in enumerate(chains(100))]
    published(audit, jobs, budget={"max_images": 100})
    for worker in ("one", "other"):
        with audit.transaction() as tx:
            budgets.admit(tx, wave=8)
        assert len(leased(audit, worker_id=worker).jobs) == 8


def test_a_job_retried_after_its_budget_was_removed_is_made(audit: AuditLog, database: Database) -> None:
    campaign_id = budgeted(audit, 4, max_images=12)
    with audit.transaction() as tx:
        budgets.admit(tx, wave=8)
    lease = leased(audit)
    for job in lease.jobs:
        failed(audit, lease, job)
    published(audit, chains(3, *STAGES))  # the fourth row was removed, but not pruned
    with audit.transaction() as tx:
        job_control.retry(tx, campaign_id=campaign_id, statuses=["failed"])
    worked(audit)
    assert made(database) == {"draft": 4, "scene": 4, "final": 4}


def test_a_finished_campaign_costs_a_poll_nothing_more(audit: AuditLog) -> None:
    budgeted(audit, 2, max_images=100)
    worked(audit)
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    with audit.transaction() as tx:
        event.listen(tx.connection, "before_cursor_execute", note)
        budgets.admit(tx, wave=8)
    assert len([statement for statement in seen if "campaign" in statement and "audit" not in statement]) == 1


@on_postgresql
def test_no_chain_is_begun_while_somebody_changes_the_campaign_and_nobody_waits(
    audit: AuditLog, database: Database
) -> None:
    campaign_id = budgeted(audit, 4, max_images=12)
    with database.write() as other:
        lock_campaign(other, campaign_id)
        with audit.transaction() as tx:
            tx.connection.exec_driver_sql("SET LOCAL lock_timeout = '1s'")
            budgets.admit(tx, wave=8)
        assert set(statuses(database)) == {"waiting"}
    worked(audit)
    assert made(database)["final"] == 4
