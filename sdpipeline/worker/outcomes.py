"""Outcomes of jobs and leases: record them in the database, and count them for the run's summary."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import structlog

from sdpipeline.db import leasing
from sdpipeline.db import queue as jobs
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.budgets import Charge
from sdpipeline.domain import Status
from sdpipeline.errors import SdpError
from sdpipeline.jobs import Lease, LeasedJob, StoredImage
from sdpipeline.worker.finished_picture import Attempt
from sdpipeline.worker.held_leases import HeldLeases
from sdpipeline.worker.outages import Outages
from sdpipeline.worker.retry import next_status, retry_delay_s

_log = structlog.get_logger(__name__)


class Outcomes:
    """Record how the jobs and leases of one run end; called from several stages.

    Outages of the database are waited out. ``on_progress`` is called with the number of jobs that just ended.
    """

    def __init__(
        self,
        audit: AuditLog,
        worker_id: str,
        *,
        gpu_second_cost: float,
        outages: Outages,
        held: HeldLeases,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self._audit = audit
        self._worker_id = worker_id
        self._gpu_second_cost = gpu_second_cost
        self._outages = outages
        self._held = held
        self._on_progress = on_progress
        self._counts = Counter[str]()
        self._counting = threading.Lock()

    @property
    def counts(self) -> Mapping[str, int]:
        """Ended jobs by outcome; ``reused`` counts some of ``succeeded``."""
        return self._counts

    def attempt(self, lease: Lease, leased: LeasedJob, *, gpu_seconds: float) -> Attempt:
        """Return the attempt of a job under its lease, with its price."""
        return Attempt(
            number=leased.attempt,
            lease_id=lease.id,
            worker_id=self._worker_id,
            gpu_seconds=gpu_seconds,
            cost=self._charge(gpu_seconds).cost,
        )

    def count_delivered(self) -> None:
        """Count a picture that delivery has recorded."""
        self._count("succeeded")

    def complete_copy(self, lease: Lease, leased: LeasedJob, stored: StoredImage) -> None:
        """Record a copy of an existing picture."""

        def complete() -> bool:
            with self._audit.transaction() as tx:
                charge = self._charge(stored.gpu_seconds)
                return jobs.complete(tx, lease_id=lease.id, leased=leased, stored=stored, charge=charge)

        if self._outages.wait_for_database(complete):
            self._count("succeeded", "reused")
        else:
            self.log_lost(leased)

    def fail(self, lease: Lease, leased: LeasedJob, error: SdpError, *, gpu_seconds: float = 0.0) -> None:
        """End a job's attempt with an error; the job is tried again if its retry policy allows."""
        status = next_status(error, attempt=leased.attempt, max_attempts=leased.max_attempts)
        backoff_s = retry_delay_s(leased.attempt)

        def fail() -> bool:
            with self._audit.transaction() as tx:
                return jobs.fail(
                    tx,
                    lease_id=lease.id,
                    leased=leased,
                    status=status,
                    error_kind=type(error).__name__.removesuffix("Error"),
                    error=str(error),
                    charge=self._charge(gpu_seconds),
                    backoff_s=backoff_s,
                )

        done = self._outages.wait_for_database(fail)
        _log.warning("attempt_failed", job_id=leased.id, attempt=leased.attempt, status=str(status), error=str(error))
        if done and status in {Status.FAILED, Status.BLOCKED}:
            self._count(str(status))

    def log_lost(self, leased: LeasedJob) -> None:
        """Log that another worker owns the job now."""
        _log.warning("lease_lost", job_id=leased.id, attempt=leased.attempt)

    def release(self, lease: Lease) -> None:
        """Give the unfinished jobs of a lease back; their attempts do not count."""
        self._outages.wait_for_database(partial(self._release, lease))

    def close(self, lease: Lease) -> None:
        """Close a lease that has no unfinished job."""

        def close() -> None:
            with self._audit.database.write() as connection:
                leasing.close_lease(connection, lease.id)

        self._outages.wait_for_database(close)
        self._held.remove(lease)

    def _release(self, lease: Lease) -> None:
        with self._audit.transaction() as tx:
            jobs.release(tx, lease_id=lease.id)

    def _charge(self, gpu_seconds: float) -> Charge:
        cost = gpu_seconds * self._gpu_second_cost
        return Charge(worker_id=self._worker_id, gpu_seconds=gpu_seconds, cost=cost)

    def _count(self, *outcomes: str) -> None:
        with self._counting:
            self._counts.update(outcomes)
            if self._on_progress is not None:
                self._on_progress(1)
