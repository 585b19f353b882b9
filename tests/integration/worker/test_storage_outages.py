"""Storage outages during a worker's run: it waits and reports why, completes no job wrongly, and continues."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from sdpipeline.audit import load_key, verify
from sdpipeline.db import workers
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database
from sdpipeline.db.tables import image, worker
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.storage import LocalStore, ObjectStore
from sdpipeline.worker.worker import Worker, WorkerLimits
from tests.factories import chains, published, signing_key, statuses
from tests.integration.conftest import Bucket
from tests.integration.databases import on_sqlite
from tests.integration.fault_proxy import Fault, FaultProxy

pytestmark = on_sqlite
"""Handling of storage outages does not depend on the database."""

EVERY_KIND = (
    Fault.SLOW_DOWN,
    Fault.INTERNAL_ERROR,
    Fault.RESET,
    Fault.LOST_REPLY,
    Fault.CUT_BODY,
    Fault.CUT_CHUNKS,
    Fault.STALL,
)
LEASE_TTL_S = 3.0
"""A heartbeat of a busy machine may be late by a second; a lost lease would be made again."""


@dataclass(slots=True)
class Shift:
    """A worker that runs on its own thread."""

    audit: AuditLog
    store: ObjectStore
    stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Run the worker during the block; afterwards the run has ended."""
        with self.audit.transaction() as tx:
            workers.register(tx, worker_id="worker-1", host="h", pid=1, device="cpu", description={})
        limits = WorkerLimits(max_batch=4, lease_ttl_s=LEASE_TTL_S, max_pixels=10**7)
        run = Worker("worker-1", self.audit, self.store, FakeEngine(), limits, signing_key()).run
        thread = threading.Thread(target=run, kwargs={"stop": self.stop})
        thread.start()
        try:
            yield
        finally:
            thread.join(60)
            assert not thread.is_alive()

    def note(self) -> str | None:
        with self.audit.database.read() as connection:
            found: str | None = connection.execute(select(worker.c.note)).scalar_one()
        return found

    def waits_because(self, reason: str) -> None:
        """Wait until the worker has reported the reason for longer than an unrenewed lease lasts."""
        deadline = time.monotonic() + 60
        while reason not in (self.note() or ""):
            assert time.monotonic() < deadline, self.note()
            time.sleep(0.05)
        time.sleep(LEASE_TTL_S * 1.25)
        assert reason in (self.note() or "")

    def is_whole(self, folder: Path) -> None:
        """Every job has its picture on the first attempt, and storage holds nothing else."""
        assert set(statuses(self.audit.database, "status", "attempt")) == {("succeeded", 1)}
        assert self.note() is None
        assert verify(self.audit.database, self.store, load_key(folder / "key.pem", create=True)).faults == []
        with self.audit.database.read() as connection:
            recorded = {key for row in connection.execute(select(image.c.key, image.c.sidecar_key)) for key in row}
        assert set(self.store.list()) == recorded


class Outage:
    """An outage that starts with the request for which ``begins`` is true and lasts until ``end``; its faults
    alternate."""

    def __init__(self, begins: Callable[[str, str], bool], *faults: Fault) -> None:
        self._begins = begins
        self._faults = cycle(faults)
        self._on, self._over = False, False

    def end(self) -> None:
        self._over = True

    def __call__(self, method: str, path: str) -> Fault | None:
        self._on = self._on or self._begins(method, path)
        return next(self._faults) if self._on and not self._over else None


def at_the(number: int, method: str, suffix: str) -> Callable[[str, str], bool]:
    """True from the ``number``th request of this method for a key with this suffix."""
    left = [number]

    def begins(asked: str, path: str) -> bool:
        left[0] -= asked == method and path.endswith(suffix)
        return left[0] <= 0

    return begins


@pytest.mark.parametrize(
    ("outage", "reason"),
    [
        pytest.param(
            Outage(at_the(2, "PUT", ".json"), Fault.ACCESS_DENIED),
            "AccessDenied",
            id="permissions-are-lost",
            marks=pytest.mark.long,
        ),
        # A sidecar is looked up, written, and read back: here it is stored, and the worker cannot know.
        pytest.param(Outage(at_the(4, "GET", ".json"), *EVERY_KIND), "waits for storage", id="everything-goes-wrong"),
    ],
)
def test_a_bucket_that_fails_in_the_middle_is_waited_for(
    audit: AuditLog, moto_bucket: Bucket, tmp_path: Path, outage: Outage, reason: str
) -> None:
    published(audit, chains(6))
    with FaultProxy(moto_bucket.endpoint_url, outage) as proxy:
        store = moto_bucket.store(endpoint_url=proxy.url, total_max_attempts=2, read_timeout_s=0.5)
        shift = Shift(audit, store)
        with shift.at_work():
            shift.waits_because(reason)
            assert statuses(audit.database).count("succeeded") < 6  # several requests are in flight
            assert sum(fault is not None for _, fault in proxy.seen) < 30
            outage.end()
        shift.is_whole(tmp_path)


def test_a_worker_says_what_storage_refuses_and_goes_on(audit: AuditLog, moto_bucket: Bucket, tmp_path: Path) -> None:
    published(audit, chains(3))

    def refuse(_method: str, headers: Mapping[str, str]) -> str | None:
        return "501 NotImplemented" if any(name.startswith("x-amz-checksum") for name in headers) else None

    with FaultProxy(moto_bucket.endpoint_url, refuse=refuse) as proxy:
        shift = Shift(audit, moto_bucket.store(endpoint_url=proxy.url))
        with shift.at_work():
            pass
        shift.is_whole(tmp_path)
    with audit.database.read() as connection:
        (described,) = connection.execute(select(worker.c.description)).scalars()
    assert "Content-MD5" in described[workers.STORAGE_LOSSES]["checksums"]


def test_a_worker_that_is_stopped_while_it_waits_gives_its_jobs_back(
    audit: AuditLog, database: Database, moto_bucket: Bucket
) -> None:
    published(audit, chains(4))
    outage = Outage(at_the(1, "PUT", ".png"), Fault.ACCESS_DENIED)
    with FaultProxy(moto_bucket.endpoint_url, outage) as proxy:
        shift = Shift(audit, moto_bucket.store(endpoint_url=proxy.url, total_max_attempts=2))
        with shift.at_work():
            shift.waits_because("AccessDenied")
            shift.stop.set()
    assert statuses(database, "status", "attempt") == [("ready", 0)] * 4


@pytest.mark.long
def test_a_full_disk_is_waited_for(audit: AuditLog, database: Database, tmp_path: Path) -> None:
    published(audit, chains(6))
    with small_disk(tmp_path / "storage") as disk:
        store = FillingUp(disk, after=1)
        shift = Shift(audit, store)
        with shift.at_work():
            shift.waits_because("No space left on device")
            assert statuses(database).count("succeeded") < 6
            store.ballast.unlink()
        shift.is_whole(tmp_path)


class FillingUp(LocalStore):
    """A directory whose disk is full once it holds this many pictures with their sidecars."""

    def __init__(self, root: Path, *, after: int) -> None:
        super().__init__(root)
        self.ballast = root / ".ballast"
        self._left = after

    def put(self, key: str, data: bytes, **options: Any) -> Any:
        stored = super().put(key, data, **options)
        self._left -= key.endswith(".json")
        if self._left == 0 and key.endswith(".json"):
            with suppress(OSError), self.ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        return stored


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of a megabyte, mounted at the folder until the block ends."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
