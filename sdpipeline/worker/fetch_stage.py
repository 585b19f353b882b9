"""Fetch stage: lease jobs and fetch their inputs, one batch ahead of the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from sdpipeline.backoff import Backoff
from sdpipeline.db import budgets, leasing, queries
from sdpipeline.db import queue as jobs
from sdpipeline.db.audit import AuditLog
from sdpipeline.domain import CheckpointRef
from sdpipeline.engine import Engine
from sdpipeline.errors import LeaseLostError, SdpError
from sdpipeline.jobs import Lease, LeasedJob
from sdpipeline.provenance.signing import SigningKey
from sdpipeline.storage import ForeignObjects, ObjectStore
from sdpipeline.worker import inputs
from sdpipeline.worker.circuit_breaker import CircuitBreaker
from sdpipeline.worker.heartbeat import Heartbeat
from sdpipeline.worker.held_leases import HeldLeases, LeaseWork
from sdpipeline.worker.limits import WorkerLimits
from sdpipeline.worker.outages import Outages
from sdpipeline.worker.outcomes import Outcomes
from sdpipeline.worker.reuse import Reuse
from sdpipeline.worker.stage_queue import RunEnd, StageQueue

POLLING = Backoff(first_s=0.25, longest_s=2.0, factor=1.5)
"""Delay before the next look for work; its jitter keeps many workers from asking at once."""


@dataclass(slots=True, kw_only=True)
class FetchStage:
    """Lease jobs and fetch their inputs until nothing is left or the run ends.

    ``is_idle`` is True if the stage ended because no work was left.
    """

    audit: AuditLog
    worker_id: str
    store: ObjectStore
    foreign: ForeignObjects
    signing: SigningKey
    engine: Engine
    limits: WorkerLimits
    cursor: leasing.Cursor
    campaign_id: int | None
    until_idle: bool
    breaker: CircuitBreaker
    heartbeat: Heartbeat
    outages: Outages
    outcomes: Outcomes
    reuse: Reuse
    held: HeldLeases
    end: RunEnd
    is_idle: bool = False
    _next_checkpoint: CheckpointRef | None = None

    def run(self, fetched: StageQueue) -> None:
        """Put each lease into ``fetched`` when its inputs are there."""
        polls = 0
        while not self.end.is_near:
            work = self._lease() if self._may_lease() else None
            if work is not None:
                polls = 0
                self._fetch(work, fetched)
            elif self.until_idle and not self.held and not self._is_work_left():
                self.is_idle = True
                break
            else:
                polls = 1 if self.held else polls + 1
                self.end.stop.wait(POLLING.delay_s(polls))
        fetched.put(None)

    def _may_lease(self) -> bool:
        """Return True if a lease may be taken.

        An open breaker allows one job at a time, and none before its pause is over. None is allowed while delivery is
        silent.
        """
        if self.heartbeat.is_delivery_silent:
            return False
        return not self.breaker.is_open or not (self.breaker.is_resting or self.held)

    def _lease(self) -> LeaseWork | None:
        is_trial = self.breaker.is_open
        limit = 1 if is_trial else self.limits.max_batch
        lease = self.outages.wait_for_database(partial(self._take_lease, limit=limit))
        if lease is None:
            return None
        self.held.add(lease)
        self._next_checkpoint = lease.jobs[0].request.checkpoint
        if lease.checkpoint_digest not in self.engine.resident():
            # An engine looks a checkpoint that is new to it up in the database.
            self.outages.wait_for_database(partial(self.engine.prefetch_weights, self._next_checkpoint))
        return LeaseWork(lease, is_trial=is_trial)

    def _take_lease(self, *, limit: int) -> Lease | None:
        limits = self.limits
        self.heartbeat.catch_up()
        with self.audit.transaction() as tx:
            jobs.reap(tx)
            jobs.promote(tx.connection)
            budgets.admit(
                tx, wave=limits.max_batch, gpu_second_cost=limits.gpu_second_cost, campaign_id=self.campaign_id
            )
            return leasing.take_lease(
                tx,
                worker_id=self.worker_id,
                limit=limit,
                ttl_s=limits.lease_ttl_s,
                campaign_id=self.campaign_id,
                resident=self._resident(),
                full_only=bool(self.held),
                cursor=self.cursor,
            )

    def _resident(self) -> frozenset[str]:
        """Return the checkpoints that the device will hold when the next lease starts: at least that of the last
        lease."""
        resident, needed = self.engine.resident(), self._next_checkpoint
        return resident if needed is None or needed.digest in resident else frozenset({needed.digest})

    def _is_work_left(self) -> bool:
        def ask() -> bool:
            with self.audit.database.read() as connection:
                return queries.work_left(connection, self.campaign_id)

        return self.outages.wait_for_database(ask)

    def _fetch(self, work: LeaseWork, fetched: StageQueue) -> None:
        """Fetch the inputs of a lease and hand it on; close it if none of its jobs is left."""
        for leased in self.reuse.jobs_to_make(work):
            self._fetch_inputs(work, leased)
        if work.jobs or work.waiting:
            fetched.put(work)
        else:
            self.reuse.forget(work)
            self.outcomes.close(work.lease)

    def _fetch_inputs(self, work: LeaseWork, leased: LeasedJob) -> None:
        """Fetch and decode the inputs of one job; a job with a bad input fails here, alone."""
        fetch = partial(
            inputs.fetch, self.store, self.foreign, leased, max_pixels=self.limits.max_pixels, signing=self.signing
        )
        try:
            fetched = self.outages.wait_for_services(work.lease, fetch)
        except LeaseLostError:
            self.outcomes.log_lost(leased)
        except SdpError as error:
            self.outcomes.fail(work.lease, leased, error)
        else:
            work.jobs.append(leased)
            work.requests.append(fetched.prepared)
            work.consumed.append(fetched.consumed)
