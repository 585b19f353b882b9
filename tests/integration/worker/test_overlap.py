"""Overlap of a worker's fetching, generation and delivery, and its limits."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update

from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database, now_s
from sdpipeline.db.tables import lease
from sdpipeline.domain import CheckpointRef
from sdpipeline.engine import Batch, GeneratedImage, GenerationFailure
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.storage import LocalStore
from sdpipeline.worker.worker import Worker, WorkerLimits
from tests.factories import CHECKPOINT, chains, published, signing_key, statuses
from tests.integration.databases import on_sqlite
from tests.integration.worker.test_shutdown import wait_for

pytestmark = [on_sqlite, pytest.mark.timeout(60)]
"""Overlap does not depend on the database."""

OTHER = CheckpointRef(alias="other", digest="0f" * 32)


class Narrow(LocalStore):
    """Counts concurrent puts of pictures; each put waits for ``together`` of them, or half a second."""

    def __init__(self, root: Path, together: int) -> None:
        super().__init__(root)
        self.most = 0
        self._now = 0
        self._all_here = threading.Barrier(together)
        self._counting = threading.Lock()

    def put(self, key: str, data: bytes, **options: Any) -> Any:
        if not key.endswith(".png"):
            return super().put(key, data, **options)
        with self._counting:
            self._now += 1
            self.most = max(self.most, self._now)
        with suppress(threading.BrokenBarrierError):
            self._all_here.wait(0.5)
        stored = super().put(key, data, **options)
        with self._counting:
            self._now -= 1
        return stored


def worker(audit: AuditLog, store: LocalStore, engine: FakeEngine, *, deliverers: int = 4, **more: Any) -> Worker:
    limits = WorkerLimits(max_batch=8, lease_ttl_s=60.0, max_pixels=10**7, deliverers=deliverers)
    return Worker("worker-1", audit, store, engine, limits, signing_key(), **more)


@pytest.mark.parametrize("deliverers", [1, 3])
def test_so_many_pictures_are_delivered_at_the_same_time_and_no_more(
    audit: AuditLog, database: Database, tmp_path: Path, deliverers: int
) -> None:
    published(audit, chains(6))
    store = Narrow(tmp_path, together=deliverers)
    worker(audit, store, FakeEngine(), deliverers=deliverers).run()
    assert store.most == deliverers
    assert set(statuses(database)) == {"succeeded"}


class Paced(FakeEngine):
    """Records when each batch begins."""

    def __init__(self, seconds_per_batch: float) -> None:
        super().__init__(seconds_per_batch=seconds_per_batch)
        self.begun: list[float] = []

    def generate(self, batch: Batch) -> Sequence[GeneratedImage | GenerationFailure]:
        self.begun.append(time.perf_counter())
        return super().generate(batch)


class Slow(LocalStore):
    """Needs half a second for each picture."""

    def put(self, key: str, data: bytes, **options: Any) -> Any:
        time.sleep(0.5 * key.endswith(".png"))
        return super().put(key, data, **options)


def test_a_slow_storage_holds_the_device_back_after_a_few_batches_and_the_worker_says_so(
    audit: AuditLog, tmp_path: Path
) -> None:
    published(audit, chains(48))
    engine = Paced(0.0)
    slow = worker(audit, Slow(tmp_path), engine, deliverers=8)
    done = slow.run()
    gaps = [after - before for before, after in zip(engine.begun, engine.begun[1:], strict=False)]
    # Storing one lease's pictures takes half a second. One lease is being delivered, two wait, and one is on the
    # device.
    assert sum(gaps[:3]) < sum(gaps[3:])
    assert done.waited_for["delivery"] > 0.2
    assert slow.aging.lead_s > 0.2  # jobs leased ahead waited too
    assert done.waited_for.keys() == {"work", "database", "delivery"}


def test_weights_that_the_next_lease_needs_are_foreseen_while_the_device_is_busy(
    audit: AuditLog, tmp_path: Path
) -> None:
    published(audit, (*chains(8), *chains(8, "other", checkpoint=OTHER)))
    foreseen: list[tuple[float, CheckpointRef]] = []

    class Prefetching(Paced):
        def prefetch_weights(self, ref: CheckpointRef) -> None:
            foreseen.append((time.perf_counter(), ref))

    engine = Prefetching(0.5)
    worker(audit, LocalStore(tmp_path), engine).run()
    assert {ref.digest for _, ref in foreseen} == {CHECKPOINT.digest, OTHER.digest}
    assert foreseen[-1][0] < engine.begun[1]


def test_the_device_waits_for_nobody_who_writes_to_the_database(
    audit: AuditLog, database: Database, tmp_path: Path
) -> None:
    published(audit, chains(16))
    writing, begun, waited = threading.Event(), threading.Event(), list[bool]()

    def write_meanwhile() -> None:
        with database.write():
            writing.set()
            waited.append(not begun.wait(10))

    class Watched(FakeEngine):
        def generate(self, batch: Batch) -> Sequence[GeneratedImage | GenerationFailure]:
            if not writing.is_set():
                wait_for(lambda: statuses(database).count("leased") == 16)
                threading.Thread(target=write_meanwhile).start()
                assert writing.wait(10)
                time.sleep(0.2)  # the leased jobs have been fetched
            else:
                begun.set()
            return super().generate(batch)

    worker(audit, LocalStore(tmp_path), Watched()).run()
    assert waited == [False]


def test_a_lease_whose_heart_missed_beats_is_extended_before_its_batch_begins(
    audit: AuditLog, database: Database, tmp_path: Path
) -> None:
    published(audit, chains(16))
    left_s: list[float] = []

    class Watched(FakeEngine):
        def generate(self, batch: Batch) -> Sequence[GeneratedImage | GenerationFailure]:
            wait_for(lambda: left_s or statuses(database).count("leased") == 16)
            with database.write() as connection:
                left = select(func.max(lease.c.expires_at - now_s())).where(lease.c.closed_at.is_(None))
                left_s.append(connection.execute(left).scalar_one())
                connection.execute(update(lease).values(expires_at=now_s() + 20.0))
            return super().generate(batch)

    worker(audit, LocalStore(tmp_path), Watched()).run()
    assert left_s[1] > 30.0
