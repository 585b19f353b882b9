"""Generate stage: run batches on the device, on the thread that owns it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from sdpipeline.batching import bucket_for
from sdpipeline.db import leasing
from sdpipeline.db.connection import Database
from sdpipeline.db.leasing import AgingPolicy, LeaseState
from sdpipeline.engine import Batch, Engine, GenerationFailure
from sdpipeline.errors import TransientError
from sdpipeline.jobs import Lease
from sdpipeline.worker.circuit_breaker import CircuitBreaker
from sdpipeline.worker.deliver_stage import DeliverStage
from sdpipeline.worker.heartbeat import Heartbeat
from sdpipeline.worker.held_leases import HeldLeases, LeaseWork
from sdpipeline.worker.outages import Outages
from sdpipeline.worker.outcomes import Outcomes
from sdpipeline.worker.reuse import Reuse
from sdpipeline.worker.safety_filter import filter_results
from sdpipeline.worker.stage_queue import RunEnd, StageQueue
from sdpipeline.worker.watchdog import BatchTimings, Watchdog

_T = TypeVar("_T")


@dataclass(slots=True, kw_only=True)
class GenerateStage:
    """Run each fetched lease on the device as one batch, and hand its results to delivery.

    ``on_device`` is the lease of the last batch, ``waited_for`` has the seconds that the device waited between its
    batches, by cause.
    """

    engine: Engine
    database: Database
    lease_ttl_s: float
    aging: AgingPolicy
    timings: BatchTimings
    watchdog: Watchdog
    breaker: CircuitBreaker
    heartbeat: Heartbeat
    outages: Outages
    outcomes: Outcomes
    reuse: Reuse
    deliver: DeliverStage
    held: HeldLeases
    end: RunEnd
    on_device: Lease | None = None
    batches: int = 0
    gpu_seconds: float = 0.0
    waited_for: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("work", "database", "delivery"), 0.0))

    def run(self, fetched: StageQueue, generated: StageQueue) -> None:
        """Take leases from ``fetched`` until its end, and put them into ``generated``."""
        while (work := self._timed("work", fetched.take)) is not None:
            if self.end.stop.is_set():
                continue
            if not self._timed("database", partial(self._may_start, work)):
                self._put_back(work)
                continue
            if work.requests and not self.held.is_lost(work.lease):
                self._generate(work)
            self.deliver.submit(work)
            self._timed("delivery", partial(generated.put, work))
        generated.put(None)

    def _timed(self, cause: str, act: Callable[[], _T]) -> _T:
        """Run ``act`` and record how long the device waited for it, unless the run is ending."""
        started = time.perf_counter()
        done = act()
        if done is not None or cause == "delivery":
            self.waited_for[cause] += time.perf_counter() - started
        return done

    def _may_start(self, work: LeaseWork) -> bool:
        """Return True if the batch may start; called before each forward pass.

        No batch starts for a paused campaign or on a paused worker. A lease that was cancelled counts as lost. The
        device waits for the answer, so this only reads, unless a heartbeat was missed.
        """
        lease = work.lease
        if self.breaker.is_open and not work.is_trial:
            return False
        state = self.outages.wait_for_database(partial(self._lease_state, lease))
        is_late = state.left_s is not None and state.left_s < self.lease_ttl_s / 2
        if is_late and self.heartbeat.is_delivery_silent:
            return False
        renew = partial(self.heartbeat.renew, (lease.id,))
        if state.left_s is None or (is_late and not self.outages.wait_for_database(renew)):
            self.held.mark_lost((lease.id,))
        return state.active

    def _lease_state(self, lease: Lease) -> LeaseState:
        with self.database.read() as connection:
            return leasing.lease_state(connection, lease.id)

    def _put_back(self, work: LeaseWork) -> None:
        """Release a lease that was not begun; its attempts do not count."""
        self.reuse.forget(work)
        self.outcomes.release(work.lease)
        self.held.remove(work.lease)

    def _generate(self, work: LeaseWork) -> None:
        started = time.perf_counter()
        batch = Batch(requests=work.requests, bucket=bucket_for(len(work.requests)))
        self.on_device, group_id = work.lease, work.lease.group_id
        self.aging.record_lead(time.monotonic() - work.leased_at)
        with self.watchdog.batch(self.timings.allowed_s(group_id)):
            results = self.engine.generate(batch)
            work.results = filter_results(self.engine, [leased.rules for leased in work.jobs], results)
        work.requests = []  # decoded inputs are large and no longer needed
        work.gpu_seconds = time.perf_counter() - started
        self.timings.took(group_id, work.gpu_seconds)
        self.gpu_seconds += work.gpu_seconds
        self.batches += 1
        self._record_failed_batch(work)

    def _record_failed_batch(self, work: LeaseWork) -> None:
        """Count a batch that failed whole; not in the delivery stage, as a broken device fails faster than that."""
        errors = [result.error for result in work.results if isinstance(result, GenerationFailure)]
        transient = [error for error in errors if isinstance(error, TransientError)]
        if transient and len(errors) == len(work.results):
            self.outages.record_failure(transient[-1])
