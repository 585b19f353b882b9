"""Database crashes as by a power failure: workers wait for the database, and committed data survives."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sdpipeline.audit import load_key
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import open_database
from sdpipeline.storage import LocalStore
from tests.chaos.invariants import violations
from tests.chaos.local_workers import MAX_ATTEMPTS, ChaosWorkers
from tests.chaos.postgres import PostgresServer
from tests.factories import chains, published, statuses

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

CHAINS = 40
CRASHES = 2
AWAY_S = 0.5


def test_workers_outlive_the_database(crashing_postgres: PostgresServer, home: Path) -> None:
    url = crashing_postgres.new_database("crashes")
    database = open_database(url)
    published(AuditLog(database, actor="user:test"), chains(CHAINS, "draft", "scene"), max_attempts=MAX_ATTEMPTS)
    chaos = ChaosWorkers(home, url, seed=0)
    first = [worker.pid for worker in chaos.workers]
    try:
        for crash in range(CRASHES):
            while statuses(database).count("succeeded") <= crash * CHAINS / 2:
                time.sleep(0.05)
            crashing_postgres.crash_for(AWAY_S)
        assert set(statuses(database)) - {"succeeded"}, "the crashes came too late to tell"
        chaos.finish(database)
    finally:
        chaos.stop()
    assert chaos.crashes == []
    assert [worker.pid for worker in chaos.workers] == first
    assert violations(database, LocalStore(home / "storage"), load_key(home / "seal.pem", create=True)) == []
    database.close()
