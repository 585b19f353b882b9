"""Worker: lease, fetch, generate, encode, store and complete jobs, in three overlapped stages around one device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import structlog

from sdpipeline.db import queue as jobs
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.leasing import AgingPolicy, Cursor
from sdpipeline.engine import Engine
from sdpipeline.errors import DatabaseUnavailableError
from sdpipeline.provenance.signing import SigningKey
from sdpipeline.shutdown import Stop
from sdpipeline.storage import ForeignObjects, ObjectStore
from sdpipeline.worker import forced_exit
from sdpipeline.worker.circuit_breaker import CircuitBreaker
from sdpipeline.worker.deliver_stage import DeliverStage
from sdpipeline.worker.delivery import Deliverer, LocalDeliverer
from sdpipeline.worker.fetch_stage import FetchStage
from sdpipeline.worker.generate_stage import GenerateStage
from sdpipeline.worker.heartbeat import Heartbeat
from sdpipeline.worker.held_leases import HeldLeases
from sdpipeline.worker.limits import WorkerLimits
from sdpipeline.worker.outages import Outages
from sdpipeline.worker.outcomes import Outcomes
from sdpipeline.worker.reuse import Reuse
from sdpipeline.worker.stage_queue import RunEnd, StageQueue
from sdpipeline.worker.watchdog import BatchTimings, Watchdog

__all__ = ["Worker", "WorkerLimits", "WorkerRun", "WorkerSummary"]

FAILED_EXIT_CODE = 1
FETCHED_AHEAD = 1
GENERATED_AHEAD = 2
"""Leases that may wait between two stages."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSummary:
    """Result of one run of a worker; ``idle`` is True if no work was left at its end.

    ``reused`` counts those of ``succeeded`` whose picture existed already. ``waited_for`` has the seconds that the
    device waited between its batches: for ``work`` to be leased and fetched, for the ``database``, and for
    ``delivery``.
    """

    succeeded: int = 0
    reused: int = 0
    failed: int = 0
    blocked: int = 0
    batches: int = 0
    gpu_seconds: float = 0.0
    idle: bool = False
    waited_for: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Worker:
    """Worker on one device; ``run`` may be called many times and keeps checkpoints loaded.

    State that outlives a run: the circuit ``breaker``, the batch ``timings`` and the ``aging`` policy of campaigns.
    Without a ``deliverer``, this process encodes, signs, stores and records pictures. With ``trust_anchors`` (roots in
    PEM), only pictures whose signature chains to one of them are delivered as copies.
    """

    worker_id: str
    audit: AuditLog
    store: ObjectStore
    engine: Engine
    limits: WorkerLimits
    signing: SigningKey
    foreign: ForeignObjects = field(default_factory=ForeignObjects)
    breaker: CircuitBreaker = field(default_factory=CircuitBreaker)
    timings: BatchTimings = field(default_factory=BatchTimings)
    aging: AgingPolicy = field(default_factory=AgingPolicy)
    trust_anchors: str = ""
    deliverer: Deliverer | None = None

    def run(
        self,
        *,
        campaign_id: int | None = None,
        until_idle: bool = True,
        stop: threading.Event | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> WorkerSummary:
        """Process jobs until nothing is left or ``stop`` is set.

        Leases that were not begun are released. An unexpected error ends the run, and the jobs it affected are leased
        alone from then on. ``on_progress`` is called with the number of jobs that just ended. The process ends if a
        batch hangs, if a shutdown takes too long, or if it must be immediate.
        """
        end = RunEnd(stop or threading.Event())
        run = WorkerRun(self, end, campaign_id=campaign_id, until_idle=until_idle, on_progress=on_progress)
        return run.execute()


class WorkerRun:
    """One run of a worker: its stages, each on its own thread, and what they share.

    The caller's thread owns the device. One thread leases and fetches ahead, some deliver pictures, one finishes
    leases after delivery, and one sends heartbeats.
    """

    def __init__(
        self,
        worker: Worker,
        end: RunEnd,
        *,
        campaign_id: int | None,
        until_idle: bool,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self.worker = worker
        self.end = end
        limits, database = worker.limits, worker.audit.database
        self.held = HeldLeases()
        self.watchdog = Watchdog(end.stop, limits.shutdown_grace_s, late=self._leave_late, hung=self._leave_hung)
        deliverer = worker.deliverer or LocalDeliverer(
            worker.store, worker.signing, worker.audit, most_kept=2 * limits.deliverers
        )
        self.heartbeat = Heartbeat(
            database=database,
            worker_id=worker.worker_id,
            lease_ttl_s=limits.lease_ttl_s,
            held=self.held,
            deliverer=deliverer,
            breaker=worker.breaker,
        )
        self.outages = Outages(database, worker.worker_id, breaker=worker.breaker, held=self.held, end=end)
        self.outcomes = Outcomes(
            worker.audit,
            worker.worker_id,
            gpu_second_cost=limits.gpu_second_cost,
            outages=self.outages,
            held=self.held,
            on_progress=on_progress,
        )
        self.reuse = Reuse(
            database=database,
            store=worker.store,
            signing=worker.signing,
            trust_anchors=worker.trust_anchors,
            engine=str(worker.engine.describe()["engine"]),
            outages=self.outages,
            outcomes=self.outcomes,
        )
        self.deliverers = ThreadPoolExecutor(limits.deliverers, thread_name_prefix="sdp-deliver")
        self.deliver = DeliverStage(
            deliverer=deliverer,
            pool=self.deliverers,
            outages=self.outages,
            outcomes=self.outcomes,
            reuse=self.reuse,
            held=self.held,
        )
        self.fetch = self._fetch_stage(campaign_id=campaign_id, until_idle=until_idle)
        self.generate = self._generate_stage()

    def execute(self) -> WorkerSummary:
        """Run all stages to their end; raise the first error of any stage."""
        with self.watchdog.watching():
            try:
                self._run_stages()
            finally:
                self._release_leases()
        counts = self.outcomes.counts
        return WorkerSummary(
            succeeded=counts["succeeded"],
            reused=counts["reused"],
            failed=counts["failed"],
            blocked=counts["blocked"],
            batches=self.generate.batches,
            gpu_seconds=self.generate.gpu_seconds,
            idle=self.fetch.is_idle,
            waited_for=self.generate.waited_for,
        )

    def _run_stages(self) -> None:
        """Run the device's stage on this thread and the others on their own, until all have ended."""
        fetched, generated = StageQueue(FETCHED_AHEAD, self.end), StageQueue(GENERATED_AHEAD, self.end)
        try:
            with ThreadPoolExecutor(3, thread_name_prefix="sdp-worker") as pool:
                run = self.end.run_stage
                fetch = pool.submit(run, lambda: self.fetch.run(fetched))
                deliver = pool.submit(run, lambda: self.deliver.run(generated))
                heartbeat = pool.submit(run, lambda: self.heartbeat.run(self.end))
                try:
                    run(lambda: self.generate.run(fetched, generated))
                    _raise_first_error(fetch, deliver)
                finally:
                    self.end.ended.set()
            _raise_first_error(heartbeat)
        finally:
            self.deliverers.shutdown(cancel_futures=True)

    def _release_leases(self) -> None:
        """Release open leases at the end of the run; after a crash, count their attempts."""
        if not self.held:
            return
        crashed = not self.end.stop.is_set()
        try:
            with self.worker.audit.transaction() as tx:
                if crashed:
                    jobs.reap(tx, lease_ids=list(self.held))
                for lease_id in () if crashed else self.held:
                    jobs.release(tx, lease_id=lease_id)
        except DatabaseUnavailableError as error:
            _log.warning("leases_left_to_expire", error=str(error), leases=len(self.held))

    def _leave_late(self) -> None:
        """Watchdog callback: the shutdown exceeded its grace period, or must be immediate."""
        stop = self.end.stop
        exit_code = stop.exit_code if isinstance(stop, Stop) else FAILED_EXIT_CODE
        forced_exit.leave_late(self.worker.audit, self.worker.worker_id, exit_code=exit_code, leases=len(self.held))

    def _leave_hung(self) -> None:
        """Watchdog callback: a batch exceeded its timeout."""
        lease = self.generate.on_device
        if lease is not None:
            allowed_s = self.worker.timings.allowed_s(lease.group_id)
            forced_exit.leave_hung(self.worker.audit, self.worker.worker_id, lease, allowed_s=allowed_s)

    def _fetch_stage(self, *, campaign_id: int | None, until_idle: bool) -> FetchStage:
        worker = self.worker
        return FetchStage(
            audit=worker.audit,
            worker_id=worker.worker_id,
            store=worker.store,
            foreign=worker.foreign,
            signing=worker.signing,
            engine=worker.engine,
            limits=worker.limits,
            cursor=Cursor(worker.aging),
            campaign_id=campaign_id,
            until_idle=until_idle,
            breaker=worker.breaker,
            heartbeat=self.heartbeat,
            outages=self.outages,
            outcomes=self.outcomes,
            reuse=self.reuse,
            held=self.held,
            end=self.end,
        )

    def _generate_stage(self) -> GenerateStage:
        worker = self.worker
        return GenerateStage(
            engine=worker.engine,
            database=worker.audit.database,
            lease_ttl_s=worker.limits.lease_ttl_s,
            aging=worker.aging,
            timings=worker.timings,
            watchdog=self.watchdog,
            breaker=worker.breaker,
            heartbeat=self.heartbeat,
            outages=self.outages,
            outcomes=self.outcomes,
            reuse=self.reuse,
            deliver=self.deliver,
            held=self.held,
            end=self.end,
        )


def _raise_first_error(*stages: Future[None]) -> None:
    for stage in stages:
        stage.result()
