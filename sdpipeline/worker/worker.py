"""Worker: lease, fetch, generate, encode, store and complete jobs, in three overlapped stages around one device."""

from __future__ import annotations

import math
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import structlog

from sdpipeline.batching import bucket_for
from sdpipeline.db import budgets, leasing, queries, reuse, workers
from sdpipeline.db import queue as jobs
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.leasing import AgingPolicy, LeaseState
from sdpipeline.db.reuse import Original
from sdpipeline.domain import CheckpointRef, Status
from sdpipeline.engine import Batch, Engine, GeneratedImage, GenerationFailure, PreparedRequest
from sdpipeline.errors import (
    DatabaseUnavailableError,
    DeliveryUnavailableError,
    InputImageError,
    LeaseLostError,
    ObjectConflictError,
    SdpError,
    SigningUnavailableError,
    StorageUnavailableError,
    TransientError,
)
from sdpipeline.jobs import Lease, LeasedJob, StoredImage
from sdpipeline.provenance.signing import SigningKey
from sdpipeline.shutdown import Stop, leave
from sdpipeline.storage import ForeignObjects, ObjectStore
from sdpipeline.worker import delivery, inputs
from sdpipeline.worker.circuit_breaker import CircuitBreaker
from sdpipeline.worker.delivery import Deliverer, LocalDeliverer
from sdpipeline.worker.inputs import Consumed
from sdpipeline.worker.retry import JOB_BACKOFF, next_status
from sdpipeline.worker.safety_filter import filter_results
from sdpipeline.worker.watchdog import HUNG_EXIT_CODE, BatchTimings, Watchdog

POLL_S = 0.25
LONGEST_POLL_S = 2.0
LONGEST_OUTAGE_PAUSE_S = 30.0
LONGEST_LOOK_S = 1.0
FAILED_EXIT_CODE = 1
OUTAGES: Mapping[type[TransientError], str] = {
    StorageUnavailableError: "storage",
    SigningUnavailableError: "signing",
    DeliveryUnavailableError: "delivery",
}
"""Outages that are waited out while a lease lives, by the name of the unavailable service."""

_T = TypeVar("_T")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """Limits of a worker.

    ``max_batch`` is pictures per forward pass, ``lease_ttl_s`` the lease duration, ``max_pixels`` the largest input.
    ``gpu_second_cost`` is the price of a device second. ``shutdown_grace_s`` limits the shutdown once ``stop`` is set.
    ``deliverers`` is the number of pictures that are encoded, marked and stored at the same time.
    """

    max_batch: int
    lease_ttl_s: float
    max_pixels: int
    gpu_second_cost: float = 0.0
    shutdown_grace_s: float = math.inf
    deliverers: int = 4


@dataclass(frozen=True, slots=True)
class Worker:
    """Worker on one device; ``run`` may be called many times and keeps checkpoints loaded.

    State that outlives a run: the circuit ``breaker``, the batch ``timings`` and the ``aging`` policy of campaigns.
    ``prefetch_weights`` is called with the next checkpoint if it is not loaded; it must not touch the device. Without
    a ``deliverer``, this process encodes, signs, stores and records pictures. With ``trust_anchors`` (roots in PEM),
    only pictures whose signature chains to one of them are delivered as copies.
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
    prefetch_weights: Callable[[CheckpointRef], None] | None = None
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
        bounds = _Bounds(campaign_id, until_idle, stop or threading.Event())
        return _Run(self, bounds, on_progress).execute()


@dataclass(slots=True)
class _Work:
    """One lease in the pipeline; ``jobs`` and ``consumed`` have the same order.

    ``making`` are the fingerprints that other jobs may wait for. ``waiting`` are jobs whose picture is being made for
    another job, in this lease or the previous one. Each of ``deliveries`` ends with the error that kept a picture from
    being stored, if its job did not cause that error.
    """

    lease: Lease
    leased_at: float = field(default_factory=time.monotonic)
    jobs: list[LeasedJob] = field(default_factory=list)
    making: set[str] = field(default_factory=set)
    waiting: list[LeasedJob] = field(default_factory=list)
    requests: list[PreparedRequest] = field(default_factory=list)
    consumed: list[Consumed] = field(default_factory=list)
    results: list[GeneratedImage | GenerationFailure] = field(default_factory=list)
    gpu_seconds: float = 0.0
    deliveries: list[Future[TransientError | None]] = field(default_factory=list)
    delivered: int = 0

    @property
    def share_s(self) -> float:
        """Device seconds of one job."""
        return self.gpu_seconds / len(self.jobs)


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Campaign filter and end conditions of a run."""

    campaign_id: int | None
    until_idle: bool
    stop: threading.Event


class _Ended(Exception):  # noqa: N818 -- unwinds a stage; never leaves this module
    """The run is over: the queue that this stage waits for will stay empty."""


class _Run:
    """Threads of one run.

    The caller's thread owns the device. One thread leases and fetches ahead, some deliver pictures, one completes
    leases after delivery, and one sends heartbeats.
    """

    def __init__(self, worker: Worker, bounds: _Bounds, on_progress: Callable[[int], None] | None) -> None:
        self.worker = worker
        self.bounds = bounds
        self.stop = bounds.stop
        self.on_progress = on_progress
        self._ended = threading.Event()
        self._fetched: queue.Queue[_Work | None] = queue.Queue(maxsize=1)
        self._generated: queue.Queue[_Work | None] = queue.Queue(maxsize=2)
        self._leases: dict[str, Lease] = {}
        self._lost: set[str] = set()
        self._on_device: Lease | None = None
        self._trial: str | None = None
        self._next_checkpoint: CheckpointRef | None = None
        self._watchdog = Watchdog(self.stop, worker.limits.shutdown_grace_s, late=self._leave, hung=self._leave_hung)
        self._engine = str(worker.engine.describe()["engine"])
        self._on_the_way: set[str] = set()
        self._cursor = leasing.Cursor(worker.aging)
        self._deliverer = worker.deliverer or LocalDeliverer(worker.store, worker.signing, worker.audit)
        self._counting = threading.Lock()
        self._outage = threading.Lock()
        self._told_silence = False
        self._waited_for = dict.fromkeys(("work", "database", "delivery"), 0.0)
        self._ended_as = Counter[str]()
        self._batches = 0
        self._gpu_seconds = 0.0
        self._idle = False

    def execute(self) -> WorkerSummary:
        """Run all stages to their end; raise the first error of any stage."""
        with self._watchdog.watching():
            self._run_stages()
        return WorkerSummary(
            succeeded=self._ended_as["succeeded"],
            reused=self._ended_as["reused"],
            failed=self._ended_as["failed"],
            blocked=self._ended_as["blocked"],
            batches=self._batches,
            gpu_seconds=self._gpu_seconds,
            idle=self._idle,
            waited_for=self._waited_for,
        )

    def _run_stages(self) -> None:
        try:
            with (
                self._deliverers() as self._delivering,
                ThreadPoolExecutor(3, thread_name_prefix="sdp-worker") as pool,
            ):
                fetcher, storer = (pool.submit(self._ending_all, stage) for stage in (self._fetch, self._store))
                heart = pool.submit(self._ending_all, self._beat)
                try:
                    self._ending_all(self._generate)
                    _first_error(fetcher, storer)
                finally:
                    self._ended.set()
            _first_error(heart)
        finally:
            self._give_back()

    @contextmanager
    def _deliverers(self) -> Iterator[ThreadPoolExecutor]:
        pool = ThreadPoolExecutor(self.worker.limits.deliverers, thread_name_prefix="sdp-deliver")
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)

    def _ending_all(self, stage: Callable[[], None]) -> None:
        """Run one stage; if it fails, the others stop waiting for it."""
        try:
            stage()
        except _Ended:
            self._ended.set()
        except BaseException:
            self._ended.set()
            raise

    def _give_back(self) -> None:
        """Release open leases at the end of the run; after a crash, count their attempts."""
        if not self._leases:
            return
        crashed = not self.stop.is_set()
        try:
            with self.worker.audit.transaction() as tx:
                if crashed:
                    jobs.reap(tx, lease_ids=list(self._leases))
                for lease_id in () if crashed else tuple(self._leases):
                    jobs.release(tx, lease_id=lease_id)
        except DatabaseUnavailableError as error:
            _log.warning("leases_left_to_expire", error=str(error), leases=len(self._leases))

    def _leave(self) -> None:
        """Watchdog callback: shutdown exceeded its grace period; release all leases and exit."""
        exit_code = self.stop.exit_code if isinstance(self.stop, Stop) else FAILED_EXIT_CODE
        _log.warning("worker_left", exit_code=exit_code, leases=len(self._leases))
        leave(exit_code, partial(self._record_stop, "told to end, and left with a batch unfinished"))

    def _leave_hung(self) -> None:
        """Watchdog callback: a batch hung; exit, because nothing else interrupts the thread that owns the device."""
        lease = self._on_device
        if lease is None:
            return
        allowed_s = self.worker.timings.allowed_s(lease.group_id)
        why = f"a batch hung: it took longer than {allowed_s:g} s"
        _log.error("batch_hung", lease=lease.id, jobs=[leased.id for leased in lease.jobs], allowed_s=allowed_s)
        leave(HUNG_EXIT_CODE, partial(self._record_stop, why, crashed=(lease.id,)))

    def _record_stop(self, why: str, *, crashed: Collection[str] = ()) -> None:
        """Release all leases; treat those in ``crashed`` as after a crash.

        Uses a separate audit chain, because the lock of ours may be held.
        """
        audit, worker_id = AuditLog(self.worker.audit.database, actor=self.worker.audit.actor), self.worker.worker_id
        try:
            with audit.transaction() as tx:
                if crashed:
                    jobs.reap(tx, lease_ids=crashed)
                workers.note(tx.connection, worker_id, why)
                workers.stop(tx, worker_id=worker_id)
        except DatabaseUnavailableError as error:
            _log.warning("leases_left_to_expire", error=str(error), leases=len(self._leases))

    # Leasing and fetching, one batch ahead of the device.

    def _fetch(self) -> None:
        poll_s = POLL_S
        while not self._over():
            lease = self._lease() if self._may_lease() else None
            if lease is not None:
                poll_s = POLL_S
                work = self._prepared(lease)
                if work.jobs or work.waiting:
                    self._hand_on(self._fetched, work)
                else:
                    self._finish(work)
            elif not self._leases and self.bounds.until_idle and not self._work_left():
                self._idle = True
                break
            else:
                # Jitter, so that many workers do not ask at once.
                self.stop.wait(random.uniform(poll_s / 2, poll_s))  # noqa: S311
                poll_s = POLL_S if self._leases else min(LONGEST_POLL_S, poll_s * 1.5)
        self._hand_on(self._fetched, None)

    def _over(self) -> bool:
        return self.stop.is_set() or self._ended.is_set()

    def _may_lease(self) -> bool:
        """Return True if a lease may be taken.

        An open breaker allows one job at a time, and none before its pause is over. None is allowed while delivery is
        silent.
        """
        if self._delivery_is_silent():
            return False
        breaker = self.worker.breaker
        return not breaker.is_open or not (breaker.is_resting or self._leases)

    def _lease(self) -> Lease | None:
        alone = self.worker.breaker.is_open
        lease = self._when_database_answers(partial(self._take_lease, alone=alone))
        if lease is not None:
            self._trial = lease.id if alone else None
            self._leases[lease.id] = lease
            self._next_checkpoint = lease.jobs[0].request.checkpoint
            if self.worker.prefetch_weights and lease.checkpoint_digest not in self.worker.engine.resident():
                self.worker.prefetch_weights(self._next_checkpoint)
        return lease

    def _resident(self) -> frozenset[str]:
        """Return the checkpoints that the device will hold when the next lease starts: at least that of the last
        lease."""
        resident, needed = self.worker.engine.resident(), self._next_checkpoint
        return resident if needed is None or needed.digest in resident else frozenset({needed.digest})

    def _take_lease(self, *, alone: bool) -> Lease | None:
        with self.worker.audit.transaction() as tx:
            jobs.reap(tx)
            jobs.promote(tx.connection)
            limits = self.worker.limits
            budgets.admit(
                tx,
                wave=limits.max_batch,
                gpu_second_cost=limits.gpu_second_cost,
                campaign_id=self.bounds.campaign_id,
            )
            return leasing.take_lease(
                tx,
                worker_id=self.worker.worker_id,
                limit=1 if alone else limits.max_batch,
                ttl_s=limits.lease_ttl_s,
                campaign_id=self.bounds.campaign_id,
                resident=self._resident(),
                full_only=bool(self._leases),
                cursor=self._cursor,
            )

    def _work_left(self) -> bool:
        def ask() -> bool:
            with self.worker.audit.database.read() as connection:
                return queries.work_left(connection, self.bounds.campaign_id)

        return self._when_database_answers(ask)

    def _prepared(self, lease: Lease) -> _Work:
        """Fetch and decode the inputs of the jobs; a job with a bad input fails here, alone."""
        work = _Work(lease)
        for leased in self._to_make(work):
            try:
                fetched = self._when_parts_answer(lease, partial(self._fetch_inputs, leased))
            except SdpError as error:
                self._fail(lease, leased, error)
            else:
                work.jobs.append(leased)
                work.requests.append(fetched.prepared)
                work.consumed.append(fetched.consumed)
        return work

    def _fetch_inputs(self, leased: LeasedJob) -> inputs.Fetched:
        worker = self.worker
        return inputs.fetch(
            worker.store, worker.foreign, leased, max_pixels=worker.limits.max_pixels, signing=worker.signing
        )

    # Delivering copies of existing pictures.

    def _to_make(self, work: _Work) -> Iterator[LeasedJob]:
        """Yield the jobs of the lease that need the device.

        Jobs whose picture exists are delivered as copies; jobs whose picture is being made wait for it. Equal jobs
        that two workers lease at the same time are made by both.
        """
        lease = work.lease
        # Read before the pictures are looked up: one finished in between is then found later, not made again.
        ahead = set(self._on_the_way)
        there = self._originals([leased for leased in lease.jobs if leased.fingerprint not in ahead])
        for leased in lease.jobs:
            if not _may_reuse(leased):
                yield leased
            elif leased.fingerprint in ahead:
                work.waiting.append(leased)
            elif not self._reused(lease, leased, there):
                if leased.private:
                    yield leased
                    continue
                ahead.add(leased.fingerprint)
                work.making.add(leased.fingerprint)
                self._on_the_way.add(leased.fingerprint)
                yield leased

    def _originals(self, wanted: Sequence[LeasedJob]) -> Mapping[str, Original]:
        """Return existing pictures for these jobs, by fingerprint."""
        fingerprints = {leased.fingerprint for leased in wanted if _may_reuse(leased)}

        def ask() -> Mapping[str, Original]:
            with self.worker.audit.database.read() as connection:
                return reuse.newest(connection, team=wanted[0].team, fingerprints=fingerprints)

        return self._when_database_answers(ask) if fingerprints else {}

    def _reused(self, lease: Lease, leased: LeasedJob, there: Mapping[str, Original]) -> bool:
        """Deliver a copy of an existing picture; return False if there is none, or if it differs from its record."""
        original = there.get(leased.fingerprint)
        if original is None:
            return False
        worker, attempt = self.worker, self._attempt(lease, leased, gpu_seconds=0.0)
        copy = partial(
            delivery.reuse,
            worker.store,
            leased,
            original,
            attempt,
            engine=self._engine,
            signing=worker.signing,
            trust_anchors=worker.trust_anchors,
        )
        try:
            stored = self._when_parts_answer(lease, copy)
        except (InputImageError, ObjectConflictError) as error:
            _log.warning("picture_not_reused", job_id=leased.id, key=original.stored.key, error=str(error))
            return False
        except SdpError as error:
            self._fail(lease, leased, error)
        else:
            self._complete(lease, leased, stored)
        return True

    # Generating, on the caller's thread.

    def _generate(self) -> None:
        while (work := self._timed("work", partial(self._take, self._fetched))) is not None:
            if self.stop.is_set():
                continue
            if not self._timed("database", partial(self._wanted, work.lease)):
                self._put_back(work)
                continue
            if work.requests and work.lease.id not in self._lost:
                self._make(work)
            self._begin_delivery(work)
            self._timed("delivery", partial(self._hand_on, self._generated, work))
        self._hand_on(self._generated, None)

    def _timed(self, what: str, act: Callable[[], _T]) -> _T:
        """Run ``act`` and record how long the device waited for it, unless the run is ending."""
        started = time.perf_counter()
        done = act()
        if done is not None or what == "delivery":
            self._waited_for[what] += time.perf_counter() - started
        return done

    def _make(self, work: _Work) -> None:
        started = time.perf_counter()
        batch = Batch(requests=work.requests, bucket=bucket_for(len(work.requests)))
        self._on_device, group_id = work.lease, work.lease.group_id
        self.worker.aging.record_lead(time.monotonic() - work.leased_at)
        with self._watchdog.batch(self.worker.timings.allowed_s(group_id)):
            made = self.worker.engine.generate(batch)
            work.results = filter_results(self.worker.engine, [leased.rules for leased in work.jobs], made)
        work.requests = []  # decoded inputs are large and no longer needed
        work.gpu_seconds = time.perf_counter() - started
        self.worker.timings.took(group_id, work.gpu_seconds)
        self._gpu_seconds += work.gpu_seconds
        self._batches += 1
        # Not in the delivery stage: a broken device fails faster than pictures are stored.
        errors = [result.error for result in work.results if isinstance(result, GenerationFailure)]
        transient = [error for error in errors if isinstance(error, TransientError)]
        if transient and len(errors) == len(work.results):
            self._suspect(transient[-1])

    def _wanted(self, lease: Lease) -> bool:
        """Return True if the batch may start; called before each forward pass.

        No batch starts for a paused campaign or on a paused worker. A lease that was cancelled counts as lost. The
        device waits for the answer, so this only reads, unless a heartbeat was missed.
        """

        def ask() -> LeaseState:
            with self.worker.audit.database.read() as connection:
                return leasing.lease_state(connection, lease.id)

        if self.worker.breaker.is_open and lease.id != self._trial:
            return False
        found = self._when_database_answers(ask)
        late = found.left_s is not None and found.left_s < self.worker.limits.lease_ttl_s / 2
        if late and self._delivery_is_silent():
            return False
        if found.left_s is None or (late and not self._when_database_answers(partial(self._heartbeat, (lease.id,)))):
            self._lost.add(lease.id)
        return found.active

    def _put_back(self, work: _Work) -> None:
        """Release a lease that was not begun; its attempts do not count."""
        self._on_the_way -= work.making
        self._release(work.lease)
        self._leases.pop(work.lease.id, None)

    def _release(self, lease: Lease) -> None:
        def give_back() -> None:
            with self.worker.audit.transaction() as tx:
                jobs.release(tx, lease_id=lease.id)

        self._when_database_answers(give_back)

    # Encoding, storing and completing, behind the device.

    def _begin_delivery(self, work: _Work) -> None:
        """Submit each picture to the delivery threads; the size of the queue bounds the number under way."""
        for leased, consumed, result in zip(work.jobs, work.consumed, work.results, strict=False):
            work.deliveries.append(self._delivering.submit(self._account_for, work, leased, consumed, result))
        work.results = []

    def _store(self) -> None:
        """Finish leases in order: a job may wait for a picture of the previous lease."""
        while (work := self._take(self._generated)) is not None:
            faults = [delivery.result() for delivery in work.deliveries]
            if work.delivered:
                self._recovered()
            elif last := next((fault for fault in reversed(faults) if fault), None):
                self._suspect(last)
            self._finish(work)

    def _suspect(self, error: TransientError) -> None:
        """Count a failure that no job caused; after too many in a row, pause the worker and note the reason."""
        pause_s = self.worker.breaker.failed()
        if pause_s is None:
            return
        failures = self.worker.breaker.failures
        _log.warning("worker_paused", failures=failures, error=str(error), retry_in_s=round(pause_s, 1))
        self._note(f"paused after {failures} failures in a row, the last: {error}", paused=True)

    def _recovered(self) -> None:
        if self.worker.breaker.succeeded():
            _log.warning("worker_resumed")
            self._note(None)

    def _finish(self, work: _Work) -> None:
        self._on_the_way -= work.making
        if work.waiting and work.lease.id not in self._lost:
            self._deliver_waiting(work)
        self._close(work.lease)

    def _account_for(
        self, work: _Work, leased: LeasedJob, consumed: Consumed, result: GeneratedImage | GenerationFailure
    ) -> TransientError | None:
        if work.lease.id in self._lost:
            return None
        if isinstance(result, GenerationFailure):
            self._fail(work.lease, leased, result.error, gpu_seconds=work.share_s)
            return None
        return self._deliver(work, leased, consumed, result)

    def _deliver(
        self, work: _Work, leased: LeasedJob, consumed: Consumed, generated: GeneratedImage
    ) -> TransientError | None:
        attempt = self._attempt(work.lease, leased, gpu_seconds=work.share_s)
        try:
            # Once, not at each try to store it: objects that an outage left half stored must have the same bytes.
            finish = partial(self._deliverer.finish, leased, consumed, generated, attempt)
            picture = self._when_parts_answer(work.lease, finish)
            stored = self._when_parts_answer(work.lease, partial(self._deliverer.deliver, picture))
        except SdpError as error:
            self._fail(work.lease, leased, error, gpu_seconds=work.share_s)
            return error if isinstance(error, TransientError) else None
        with self._counting:
            work.delivered += 1
        self._complete(work.lease, leased, stored)
        return None

    def _deliver_waiting(self, work: _Work) -> None:
        """Deliver copies of pictures made meanwhile; release the jobs whose picture was not made after all."""
        there = self._originals(work.waiting)
        left = [leased for leased in work.waiting if not self._reused(work.lease, leased, there)]
        if left:
            self._release(work.lease)

    def _attempt(self, lease: Lease, leased: LeasedJob, *, gpu_seconds: float) -> delivery.Attempt:
        return delivery.Attempt(
            number=leased.attempt, lease_id=lease.id, worker_id=self.worker.worker_id, gpu_seconds=gpu_seconds
        )

    def _complete(self, lease: Lease, leased: LeasedJob, stored: StoredImage) -> None:
        complete = partial(self._deliverer.complete, lease.id, leased, stored, self._charge(stored.gpu_seconds))
        try:
            done = self._when_database_answers(partial(self._when_parts_answer, lease, complete))
        except LeaseLostError:
            done = False
        if done:
            self._count(*(("succeeded",) if stored.reused_from is None else ("succeeded", "reused")))
        else:
            _log.warning("lease_lost", job_id=leased.id, attempt=leased.attempt)

    def _fail(self, lease: Lease, leased: LeasedJob, error: SdpError, *, gpu_seconds: float = 0.0) -> None:
        status = next_status(error, attempt=leased.attempt, max_attempts=leased.max_attempts)

        def fail() -> bool:
            with self.worker.audit.transaction() as tx:
                return jobs.fail(
                    tx,
                    lease_id=lease.id,
                    leased=leased,
                    status=status,
                    error_kind=type(error).__name__.removesuffix("Error"),
                    error=str(error),
                    charge=self._charge(gpu_seconds),
                    backoff_s=JOB_BACKOFF.delay_s(leased.attempt),
                )

        done = self._when_database_answers(fail)
        _log.warning("attempt_failed", job_id=leased.id, attempt=leased.attempt, status=str(status), error=str(error))
        if done and status in {Status.FAILED, Status.BLOCKED}:
            self._count(str(status))

    def _charge(self, gpu_seconds: float) -> budgets.Charge:
        cost = gpu_seconds * self.worker.limits.gpu_second_cost
        return budgets.Charge(worker_id=self.worker.worker_id, gpu_seconds=gpu_seconds, cost=cost)

    def _close(self, lease: Lease) -> None:
        def close() -> None:
            with self.worker.audit.database.write() as connection:
                leasing.close_lease(connection, lease.id)

        self._when_database_answers(close)
        self._leases.pop(lease.id, None)

    def _count(self, *outcomes: str) -> None:
        """Count an ended job; called from the threads that fetch and that store."""
        with self._counting:
            self._ended_as.update(outcomes)
            if self.on_progress is not None:
                self.on_progress(1)

    # Heartbeats.

    def _beat(self) -> None:
        """Extend open leases four times in their lifetime; a lease that no longer exists is lost.

        No lease is extended while delivery is silent: its pictures may never be recorded here.
        """
        every_s = self.worker.limits.lease_ttl_s / 4
        beaten_at = time.monotonic()
        while not self._ended.wait(min(every_s, LONGEST_LOOK_S)):
            held = () if self._delivery_is_silent() else tuple(self._leases)
            try:
                self._note_silence()
                if time.monotonic() - beaten_at < 0.9 * every_s:  # the wait may end a little early
                    continue
                beaten_at = time.monotonic()
                alive = self._heartbeat(held)
            except DatabaseUnavailableError as error:
                _log.warning("heartbeat_failed", error=str(error))
                continue
            # A lease that was closed normally in the meantime is not lost.
            self._lost |= {lease_id for lease_id in held if lease_id not in alive and lease_id in self._leases}
        # A run may end before the next look: the note would stay.
        if self._told_silence:
            with suppress(DatabaseUnavailableError):
                self._note_silence()

    def _heartbeat(self, lease_ids: Collection[str]) -> frozenset[str]:
        with self.worker.audit.database.write() as connection:
            workers.seen(connection, self.worker.worker_id)
            return leasing.heartbeat(connection, lease_ids, ttl_s=self.worker.limits.lease_ttl_s)

    def _delivery_is_silent(self) -> bool:
        return self._deliverer.silent_s() >= self.worker.limits.lease_ttl_s / 4

    def _note_silence(self) -> None:
        """Note for ``status`` that the delivery process does not answer; clear the note when it does."""
        silent_s = self._deliverer.silent_s()
        if bool(silent_s) == self._told_silence:
            return
        if not self.worker.breaker.is_open:  # else the note says why the worker paused
            why = "waits for delivery: its process does not answer, and is replaced" if silent_s else None
            with self.worker.audit.database.write() as connection:
                workers.note(connection, self.worker.worker_id, why)
        self._told_silence = bool(silent_s)

    def _when_parts_answer(self, lease: Lease, ask: Callable[[], _T]) -> _T:
        """Wait out an outage of storage or of the signing key while the lease lives, as its jobs did not cause it."""
        while True:
            try:
                return ask()
            except tuple(OUTAGES) as error:
                # One thread retries for all, so that an outage counts once, however many pictures it affects.
                if self._outage.acquire(blocking=False):
                    try:
                        return self._waited_out(lease, ask, error)
                    finally:
                        self._outage.release()
                with self._outage:
                    self._go_on(lease, error)

    def _waited_out(self, lease: Lease, ask: Callable[[], _T], error: TransientError) -> _T:
        pause_s = 1.0
        while True:
            what = next(name for kind, name in OUTAGES.items() if isinstance(error, kind))
            _log.warning(f"{what}_unavailable", error=str(error), retry_in_s=pause_s)
            self._note(f"waits for {what}: {error}")
            self._suspect(error)
            self._pause(pause_s, error)
            self._go_on(lease, error)
            try:
                answer = ask()
            except tuple(OUTAGES) as again:
                error, pause_s = again, min(LONGEST_OUTAGE_PAUSE_S, pause_s * 2)
            else:
                self._note(None)
                self._recovered()
                return answer

    def _go_on(self, lease: Lease, error: TransientError) -> None:
        """Raise _Ended if the run is over, and LeaseLostError if the lease was lost during the wait."""
        self._pause(0.0, error)
        if lease.id in self._lost:
            raise LeaseLostError(f"{error}, and the lease was lost meanwhile") from error

    def _when_database_answers(self, ask: Callable[[], _T]) -> _T:
        """Wait out a database outage. Every transition is fenced, so repeating a call is safe."""
        pause_s, noted = 0.5, ""
        while True:
            try:
                answer = ask()
            except DatabaseUnavailableError as error:
                _log.warning("database_unavailable", error=str(error), fix=error.fix, retry_in_s=pause_s)
                noted = noted or self._note_outage(error)
                self._pause(pause_s, error)
                pause_s = min(LONGEST_OUTAGE_PAUSE_S, pause_s * 2)
            else:
                if noted:
                    self._note_outage(None, noted)
                return answer

    def _note_outage(self, error: DatabaseUnavailableError | None, noted: str = "") -> str:
        """Write the reason for ``status``, or clear what was ``noted``, if the database accepts it.

        Notes of others stay. Returns the text that was noted: empty if the database itself gives no reason.
        """
        if error is not None and error.fix is None:
            return ""
        text = noted or f"waits for the database: {error}"
        try:
            with self.worker.audit.database.write() as connection:
                if error is None:
                    workers.remove_note(connection, self.worker.worker_id, text)
                else:
                    workers.set_note_if_none(connection, self.worker.worker_id, text)
        except DatabaseUnavailableError:
            return noted
        return text

    def _pause(self, pause_s: float, error: SdpError) -> None:
        if self._ended.wait(pause_s) or self.stop.is_set():
            raise _Ended from error

    def _note(self, note: str | None, *, paused: bool = False) -> None:
        def write() -> None:
            with self.worker.audit.database.write() as connection:
                workers.note(connection, self.worker.worker_id, note, paused=paused)

        self._when_database_answers(write)

    def _hand_on(self, to: queue.Queue[_Work | None], work: _Work | None) -> None:
        while True:
            if self._ended.is_set():
                raise _Ended
            try:
                return to.put(work, timeout=POLL_S)
            except queue.Full:
                continue

    def _take(self, source: queue.Queue[_Work | None]) -> _Work | None:
        while True:
            try:
                return source.get(timeout=POLL_S)
            except queue.Empty:
                if self._ended.is_set():
                    raise _Ended from None


def _may_reuse(leased: LeasedJob) -> bool:
    return leased.rules.reuse


def _first_error(*stages: Future[None]) -> None:
    for stage in stages:
        stage.result()
