"""Delivery of one picture in this process, interrupted by outages between its steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdpipeline.db import leasing, queries, queue, workers
from sdpipeline.db.audit import AuditLog, Transaction
from sdpipeline.db.connection import Database
from sdpipeline.domain import CheckpointRef
from sdpipeline.engine import Batch, GeneratedImage, PreparedRequest
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.errors import DatabaseUnavailableError, LeaseLostError, StorageUnavailableError
from sdpipeline.jobs import Lease
from sdpipeline.storage import LocalStore
from sdpipeline.worker.delivery import LocalDeliverer
from sdpipeline.worker.finished_picture import Attempt, DeliveryRequest
from sdpipeline.worker.inputs import Consumed
from sdpipeline.worker.worker import Worker, WorkerLimits
from tests.factories import chains, expired, leased, published, signing_key, statuses
from tests.integration.databases import on_sqlite

pytestmark = on_sqlite


class FailingStore(LocalStore):
    """A directory that rejects the first sidecars."""

    def __init__(self, root: Path, *, failures: int) -> None:
        super().__init__(root)
        self.puts: list[str] = []
        self._failures = failures

    def put(self, key: str, data: bytes, **options: Any) -> Any:
        self.puts.append(key)
        if key.endswith(".json") and self._failures:
            self._failures -= 1
            raise StorageUnavailableError("no space left")
        return super().put(key, data, **options)


class FailingAudit(AuditLog):
    """An audit log whose database is unavailable for the first transaction: before it begins, or after its commit."""

    def __init__(self, database: Database, *, commits: bool) -> None:
        super().__init__(database, actor="worker:test")
        self.failures = 1
        self._commits = commits

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        fails, self.failures = bool(self.failures), 0
        if fails and not self._commits:
            raise DatabaseUnavailableError("away")
        with super().transaction() as tx:
            yield tx
        if fails:
            raise DatabaseUnavailableError("away before it answered")


def one_picture(audit: AuditLog) -> DeliveryRequest:
    """The picture of a leased job."""
    return picture_of(leased(audit))


def picture_of(lease: Lease) -> DeliveryRequest:
    (made,) = FakeEngine().generate(Batch(requests=[PreparedRequest(request=lease.jobs[0].request)], bucket=1))
    assert isinstance(made, GeneratedImage)
    attempt = Attempt(number=1, lease_id=lease.id, worker_id="worker-1", gpu_seconds=1.0)
    return DeliveryRequest(leased=lease.jobs[0], consumed=Consumed(), generated=made, attempt=attempt)


def test_an_interrupted_delivery_goes_on_with_the_same_bytes(
    audit: AuditLog, database: Database, tmp_path: Path
) -> None:
    published(audit, chains(1))
    store = FailingStore(tmp_path / "storage", failures=2)
    deliverer, request = LocalDeliverer(store, signing_key(), audit), one_picture(audit)
    for _ in range(2):
        with pytest.raises(StorageUnavailableError):
            deliverer.deliver(request)
    stored = deliverer.deliver(request)
    assert set(store.list()) == {stored.key, stored.sidecar_key}
    assert statuses(database) == ["succeeded"]


@pytest.mark.parametrize("commits", [False, True], ids=["before the transaction", "after its commit"])
def test_a_stored_picture_is_recorded_once_and_not_stored_again_after_an_outage_of_the_database(
    audit: AuditLog, database: Database, tmp_path: Path, *, commits: bool
) -> None:
    published(audit, chains(1))
    store, request = FailingStore(tmp_path / "storage", failures=0), one_picture(audit)
    deliverer = LocalDeliverer(store, signing_key(), FailingAudit(database, commits=commits))
    with pytest.raises(DatabaseUnavailableError):
        deliverer.deliver(request)
    assert statuses(database) == ["succeeded" if commits else "leased"]
    stored = deliverer.deliver(request)
    assert store.puts == [stored.key, stored.sidecar_key]
    assert statuses(database) == ["succeeded"]


def test_a_picture_whose_lease_was_lost_is_not_recorded(audit: AuditLog, database: Database, tmp_path: Path) -> None:
    published(audit, chains(1))
    deliverer, lease = LocalDeliverer(LocalStore(tmp_path / "storage"), signing_key(), audit), leased(audit)
    request = picture_of(lease)
    expired(audit, lease)
    with pytest.raises(LeaseLostError):
        deliverer.deliver(request)
    assert statuses(database) == ["ready"]
    deliverer.deliver(one_picture(audit))
    with pytest.raises(LeaseLostError):
        deliverer.deliver(request)  # recorded, but under another lease


def test_only_so_many_interrupted_deliveries_are_kept(audit: AuditLog, tmp_path: Path) -> None:
    published(audit, chains(1))
    store, request = FailingStore(tmp_path / "storage", failures=3), one_picture(audit)
    deliverer = LocalDeliverer(store, signing_key(), audit, most_kept=1)
    other = replace(request, attempt=replace(request.attempt, lease_id="another lease"))
    for each in (request, other, request):
        with pytest.raises(StorageUnavailableError):
            deliverer.deliver(each)
    first, _, last = (key for key in store.puts if key.endswith(".png"))
    assert first != last  # encoded again


def test_a_worker_clears_its_note_after_an_outage_of_storage_that_an_outage_of_the_database_followed(
    audit: AuditLog, database: Database, tmp_path: Path
) -> None:
    published(audit, chains(1))
    with audit.transaction() as tx:
        workers.register(tx, worker_id="worker-1", host="here", pid=1, device="cpu", description={})
    store, limits = (
        FailingStore(tmp_path / "storage", failures=1),
        WorkerLimits(max_batch=1, lease_ttl_s=60.0, max_pixels=10**7),
    )
    deliverer = LocalDeliverer(store, signing_key(), FailingAudit(database, commits=False))
    worker = Worker("worker-1", audit, store, FakeEngine(), limits, signing_key(), deliverer=deliverer)
    assert worker.run().succeeded == 1
    with database.read() as connection:
        (described,) = queries.live_workers(connection)
    assert described["note"] is None
    assert len(list(store.list())) == 2


def expire_all(audit: AuditLog) -> None:
    """Close the worker's leases as if they had expired."""
    with audit.transaction() as tx:
        queue.reap(tx, lease_ids=leasing.open_leases(tx.connection, ["worker-1"]))


class ExpiringAudit(AuditLog):
    """An audit log whose database reports a full disk at its first transaction, during which all leases expire."""

    def __init__(self, database: Database, lease_audit: AuditLog) -> None:
        super().__init__(database, actor="worker:test")
        self.lease_audit, self.is_first = lease_audit, True

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        if self.is_first:
            self.is_first = False
            expire_all(self.lease_audit)
            raise DatabaseUnavailableError("the disk is full", fix="free space")
        with super().transaction() as tx:
            yield tx


class ExpiringStore(LocalStore):
    """A directory that rejects its first object; all leases expire during that outage."""

    def __init__(self, root: Path, lease_audit: AuditLog) -> None:
        super().__init__(root)
        self.lease_audit, self.is_first = lease_audit, True

    def put(self, key: str, data: bytes, **options: Any) -> Any:
        if self.is_first:
            self.is_first = False
            expire_all(self.lease_audit)
            raise StorageUnavailableError("no space left")
        return super().put(key, data, **options)


@pytest.mark.parametrize("service", ["database", "storage"])
def test_a_worker_clears_its_note_after_an_outage_in_which_its_lease_expired(
    audit: AuditLog, database: Database, tmp_path: Path, service: str
) -> None:
    published(audit, chains(1))
    with audit.transaction() as tx:
        workers.register(tx, worker_id="worker-1", host="here", pid=1, device="cpu", description={})
    folder = tmp_path / "storage"
    store = ExpiringStore(folder, audit) if service == "storage" else LocalStore(folder)
    deliverer = LocalDeliverer(store, signing_key(), ExpiringAudit(database, audit) if service == "database" else audit)
    limits = WorkerLimits(max_batch=1, lease_ttl_s=60.0, max_pixels=10**7)
    worker = Worker("worker-1", audit, store, FakeEngine(), limits, signing_key(), deliverer=deliverer)
    assert worker.run().succeeded == 1
    with database.read() as connection:
        (described,) = queries.live_workers(connection)
    assert described["note"] is None


class UnknownCheckpoint(FakeEngine):
    """An engine that looks its checkpoint up in a database that is unavailable at first."""

    failures = 1

    def prefetch_weights(self, ref: CheckpointRef) -> None:
        if self.failures:
            self.failures -= 1
            raise DatabaseUnavailableError("away")


def test_an_outage_of_the_database_while_a_checkpoint_is_looked_up_is_waited_out(
    audit: AuditLog, tmp_path: Path
) -> None:
    published(audit, chains(1))
    limits = WorkerLimits(max_batch=1, lease_ttl_s=60.0, max_pixels=10**7)
    worker = Worker("worker-1", audit, LocalStore(tmp_path), UnknownCheckpoint(), limits, signing_key())
    assert worker.run().succeeded == 1
