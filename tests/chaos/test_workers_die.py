"""Workers killed and frozen beyond their leases: every job ends with exactly one recorded picture."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from sdpipeline.audit import load_key
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database
from sdpipeline.storage import LocalStore
from tests.chaos.faults import operator_actions, reopen_all, repeatedly
from tests.chaos.invariants import violations
from tests.chaos.local_workers import MAX_ATTEMPTS, TICK_S, ChaosWorkers
from tests.factories import chains, published, statuses
from tests.integration.databases import on_postgresql

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(0)]

CHAOS_S = 3.0


def run_campaign(
    audit: AuditLog, database_url: str, home: Path, *, seed: int, fencing: bool = True
) -> tuple[ChaosWorkers, list[str]]:
    """Inject faults in the middle of a campaign, let the workers finish, and return the violated invariants."""
    # The second campaign requests the pictures of the first: some are copied, some made twice, none is missing.
    for name in ("spring", "autumn"):
        published(audit, chains(int(30 * CHAOS_S), "draft", "scene"), name=f"{name}-{seed}", max_attempts=MAX_ATTEMPTS)
    # One picture at a time leaves more of a lease unfinished when its worker freezes, so the mutant is detected sooner.
    chaos = ChaosWorkers(home, database_url, seed, fencing=fencing, settings={} if fencing else {"SDP_DELIVERERS": "1"})
    try:
        # A killed worker cannot write after its lease was lost; a frozen one can.
        chaos.inject_faults(CHAOS_S, kill_share=0.5 if fencing else 0.0)
        chaos.finish(audit.database)
    finally:
        chaos.stop()
    key = load_key(home / "seal.pem", create=True)
    return chaos, violations(audit.database, LocalStore(home / "storage"), key)


def test_nothing_is_lost_and_nothing_made_twice(
    audit: AuditLog, database: Database, database_url: str, home: Path
) -> None:
    chaos, found = run_campaign(audit, database_url, home, seed=0)
    print(f"{database.writer.dialect.name}: {chaos.kills} kills, {chaos.freezes} freezes in {CHAOS_S} s")
    assert found == []
    assert chaos.crashes == []
    assert chaos.kills + chaos.freezes >= CHAOS_S / 2


@pytest.mark.long
@on_postgresql
def test_nothing_is_lost_while_delivery_dies_alone_and_people_change_their_minds(
    audit: AuditLog, database: Database, database_url: str, home: Path
) -> None:
    for name in ("spring", "autumn"):
        published(audit, chains(20, "draft", "scene"), name=name, max_attempts=MAX_ATTEMPTS)
    chaos = ChaosWorkers(home, database_url, 0, workers=2, delivery=True, settings={"SDP_ENGINE__MAX_BATCH": "4"})
    chance = random.Random(0)
    try:
        while "succeeded" not in statuses(database):  # a delivery process takes a while to start
            time.sleep(0.05)
        with repeatedly(operator_actions(audit, chance, chains_at_once=20), chance, (0.1, 0.5)):
            chaos.inject_faults(2 * CHAOS_S, tick_s=TICK_S)
        reopen_all(audit)
        chaos.finish(database)
    finally:
        chaos.stop()
    print(f"{chaos.delivery_kills} kills and {chaos.delivery_freezes} freezes of delivery alone")
    key = load_key(home / "seal.pem", create=True)
    assert violations(database, LocalStore(home / "storage"), key) == []
    assert (chaos.crashes, chaos.surviving_delivery_processes()) == ([], [])
    assert chaos.delivery_kills + chaos.delivery_freezes


@pytest.mark.long
@on_postgresql
def test_the_suite_catches_a_queue_without_fencing(audit: AuditLog, database_url: str, home: Path) -> None:
    freezes = 0
    for seed in (1, 2, 3):  # it is chance whether a frozen worker held a job that another one had finished meanwhile
        chaos, found = run_campaign(audit, database_url, home, seed=seed, fencing=False)
        print("without fencing:", *(found + chaos.crashes)[:5], sep="\n  ")
        freezes += chaos.freezes
        if found + chaos.crashes:
            return
    pytest.fail(f"nobody noticed after {freezes} freezes")
