"""Heartbeat of a worker: leases that it still holds are not taken for those of a lost worker."""

from __future__ import annotations

import time
from pathlib import Path

from sdpipeline.db import queue
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database
from sdpipeline.storage import LocalStore
from sdpipeline.worker.circuit_breaker import CircuitBreaker
from sdpipeline.worker.delivery import LocalDeliverer
from sdpipeline.worker.heartbeat import Heartbeat
from sdpipeline.worker.held_leases import HeldLeases
from tests.factories import chains, leased, published, signing_key, statuses
from tests.integration.databases import on_sqlite

TTL_S = 0.2


@on_sqlite
def test_an_overdue_heartbeat_is_caught_up_before_expired_leases_are_reaped(
    audit: AuditLog, database: Database, tmp_path: Path
) -> None:
    published(audit, chains(2))
    kept, abandoned = leased(audit, limit=1, ttl_s=TTL_S), leased(audit, limit=1, ttl_s=TTL_S)
    held = HeldLeases()
    held.add(kept)
    heartbeat = Heartbeat(
        database=database,
        worker_id="worker-1",
        lease_ttl_s=TTL_S,
        held=held,
        deliverer=LocalDeliverer(LocalStore(tmp_path / "storage"), signing_key(), audit),
        breaker=CircuitBreaker(),
    )
    time.sleep(1.5 * TTL_S)
    heartbeat.catch_up()
    with audit.transaction() as tx:
        assert queue.reap(tx) == len(abandoned.jobs)
    assert sorted(statuses(database)) == ["leased", "ready"]
    assert not held.is_lost(kept)
