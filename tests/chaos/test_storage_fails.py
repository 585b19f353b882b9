"""Storage that fails at random, is unavailable for a while, or is full: no job succeeds without its stored picture."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from sqlalchemy import select

from sdpipeline.audit import load_key
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database
from sdpipeline.db.tables import worker
from sdpipeline.storage import LocalStore
from tests.chaos.disk import small_disk
from tests.chaos.faults import random_faults, s3_settings
from tests.chaos.invariants import violations
from tests.chaos.local_workers import MAX_ATTEMPTS, ChaosWorkers
from tests.factories import chains, published, statuses
from tests.integration.conftest import Bucket
from tests.integration.databases import on_postgresql, on_sqlite
from tests.integration.fault_proxy import Fault, FaultProxy

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

CHAINS = 12
FAULT_SHARE = 0.05


@on_postgresql
def test_a_bucket_that_fails_and_goes_away_costs_time_alone(
    audit: AuditLog, database: Database, database_url: str, bucket: Bucket, home: Path
) -> None:
    published(audit, chains(CHAINS, "draft", "scene"), max_attempts=MAX_ATTEMPTS)
    unsteady = random_faults(random.Random(0), FAULT_SHARE)
    with FaultProxy(bucket.endpoint_url, unsteady) as proxy:
        chaos = ChaosWorkers(home, database_url, seed=0, outages=True, settings=s3_settings(bucket, proxy))
        try:
            while not statuses(database).count("succeeded"):
                time.sleep(0.05)
            proxy.choose = lambda _method, _path: Fault.RESET
            time.sleep(0.5)
            proxy.choose = unsteady
            chaos.finish(database)
        finally:
            chaos.stop()
        struck = {fault for _, fault in proxy.seen if fault is not None}
    assert len(struck) >= 3
    assert chaos.crashes == []
    assert violations(database, bucket.store(), load_key(home / "seal.pem", create=True)) == []


@on_sqlite
def test_a_disk_that_is_full_stops_the_work_until_there_is_room(
    audit: AuditLog, database: Database, database_url: str, home: Path
) -> None:
    published(audit, chains(CHAINS, "draft", "scene"), max_attempts=MAX_ATTEMPTS)
    with small_disk(home / "storage", size_mib=16) as disk:
        chaos = ChaosWorkers(home, database_url, seed=0)
        try:
            while not statuses(database).count("succeeded"):
                time.sleep(0.05)
            disk.fill()
            while not _notes(database):
                time.sleep(0.05)
            assert all("No space left on device" in note for note in _notes(database))
            assert set(statuses(database)) - {"succeeded"}
            disk.free()
            chaos.finish(database)
        finally:
            chaos.stop()
        assert chaos.crashes == []
        assert violations(database, LocalStore(home / "storage"), load_key(home / "seal.pem", create=True)) == []


def _notes(database: Database) -> list[str]:
    """The notes that give the reason why workers wait."""
    with database.read() as connection:
        return list(connection.execute(select(worker.c.note).where(worker.c.note.is_not(None))).scalars())
