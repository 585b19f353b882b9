"""Queue benchmark: database throughput of submits, leases, heartbeats and completions, without making pictures."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sdpipeline.bench.statistics import Clock, OnProgress
from sdpipeline.bench.workload import Workload, publish
from sdpipeline.db import leasing, queue
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.budgets import Charge
from sdpipeline.db.connection import Database
from sdpipeline.db.leasing import Cursor
from sdpipeline.domain import CheckpointRef, Json, digest
from sdpipeline.jobs import Lease, LeasedJob, StoredImage

LEASE_TTL_S = 60.0
NOTHING = Workload(
    checkpoint=CheckpointRef(alias="bench", digest="b" * 64),
    width=512,
    height=512,
    num_inference_steps=20,
    guidance_scale=4.0,
    scheduler="ddim",
)
"""Workload with rows of the usual size; its weights do not exist."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """``jobs`` in total, leased ``batch`` at a time by ``workers`` that share only the database."""

    jobs: int
    batch: int
    workers: int


def measure(database: Database, load: Load, on_progress: OnProgress) -> Json:
    """Complete all jobs of a scratch database at full speed; see :func:`sdpipeline.db.scratch.scratch_database`."""
    started = time.perf_counter()
    publish(AuditLog(database, actor="bench"), NOTHING.jobs(0, load.jobs), name="bench")
    submitted_s = time.perf_counter() - started
    workers = _Workers(database, load, on_progress)
    started = time.perf_counter()
    with ThreadPoolExecutor(load.workers, thread_name_prefix="sdp-bench") as pool:
        for done in [pool.submit(workers.work, f"bench-{n}") for n in range(load.workers)]:
            done.result()
    wall_s = time.perf_counter() - started
    rows = [workers.clock.figures(name, wall_s=wall_s) for name in ("lease", "heartbeat", "complete", "close")]
    return {
        "jobs": load.jobs,
        "batch": load.batch,
        "workers": load.workers,
        "submitted_per_s": round(load.jobs / submitted_s, 1),
        "jobs_per_s": round(workers.done / wall_s, 1),
        "transitions": rows,
    }


class _Workers:
    """Workers without a device, which make the transitions of real ones with no work in between."""

    def __init__(self, database: Database, load: Load, on_progress: OnProgress) -> None:
        self.clock = Clock()
        self.done = 0
        self._database = database
        self._load = load
        self._on_progress = on_progress
        self._counting = threading.Lock()

    def work(self, worker_id: str) -> None:
        audit, cursor = AuditLog(self._database, actor=worker_id), Cursor()
        while (lease := self._lease(audit, worker_id, cursor)) is not None:
            with self.clock.timing("heartbeat"), self._database.write() as connection:
                leasing.renew(connection, (lease.id,), ttl_s=LEASE_TTL_S)
            for leased in lease.jobs:
                self._complete(audit, worker_id, lease, leased)
            with self.clock.timing("close"), self._database.write() as connection:
                leasing.close_lease(connection, lease.id)
            self._count(lease.jobs)

    def _lease(self, audit: AuditLog, worker_id: str, cursor: Cursor) -> Lease | None:
        with self.clock.timing("lease"), audit.transaction() as tx:
            queue.reap(tx)
            queue.promote(tx.connection)
            return leasing.take_lease(tx, worker_id=worker_id, limit=self._load.batch, ttl_s=LEASE_TTL_S, cursor=cursor)

    def _complete(self, audit: AuditLog, worker_id: str, lease: Lease, leased: LeasedJob) -> None:
        charge = Charge(worker_id=worker_id, gpu_seconds=1.0)
        with self.clock.timing("complete"), audit.transaction() as tx:
            queue.complete(tx, lease_id=lease.id, leased=leased, stored=_stored(leased), charge=charge)

    def _count(self, jobs: Sequence[LeasedJob]) -> None:
        with self._counting:
            self.done += len(jobs)
            self._on_progress(self.done, self._load.jobs)


def _stored(leased: LeasedJob) -> StoredImage:
    """Return a description of a stored picture as a worker would report it."""
    sha256 = digest(leased.fingerprint)
    key = f"{leased.team}/{leased.campaign}/{leased.stage}/{leased.fingerprint}/{sha256}"
    return StoredImage(
        key=f"{key}.png",
        url=f"s3://bench/{key}.png",
        sha256=sha256,
        pixels_sha256=sha256,
        size_bytes=1_200_000,
        version_id=None,
        width=512,
        height=512,
        sidecar_key=f"{key}.json",
        sidecar_sha256=sha256,
        gpu_seconds=1.0,
        timings={"generate_s": 1.0, "measure_s": 0.01, "encode_s": 0.1, "store_s": 0.1},
    )
