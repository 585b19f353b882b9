"""Lease, fetch, generate, encode, store, complete: three overlapped stages around one device."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import structlog

from sdpipeline import delivery
from sdpipeline.batching import bucket_for
from sdpipeline.db import budgets, originals, reports, workers
from sdpipeline.db import queue as jobs
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.originals import Original
from sdpipeline.db.queue import Lease, LeasedJob, StoredImage
from sdpipeline.domain import Json, Status
from sdpipeline.engine import Batch, Engine, GeneratedImage, GenerationFailure, PreparedRequest
from sdpipeline.errors import (
    DatabaseUnavailableError,
    InputImageError,
    LeaseLostError,
    ObjectConflictError,
    SdpError,
    StorageUnavailableError,
)
from sdpipeline.retry import backoff_s, next_status
from sdpipeline.storage import ForeignObjects, ObjectStore

POLL_S = 0.25
LONGEST_POLL_S = 2.0
LONGEST_OUTAGE_PAUSE_S = 30.0

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSummary:
    """What one run of a worker did; ``idle`` says that no work was left when it ended.

    ``reused`` counts those of ``succeeded`` whose picture was there already.
    """

    succeeded: int = 0
    reused: int = 0
    failed: int = 0
    batches: int = 0
    gpu_seconds: float = 0.0
    idle: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """``max_batch`` pictures per forward pass, leases of ``lease_ttl_s`` seconds, inputs up to ``max_pixels``, and
    what a second of the device costs."""

    max_batch: int
    lease_ttl_s: float
    max_pixels: int
    gpu_second_cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Worker:
    """One process's device with what it needs; ``run`` may be called many times and keeps checkpoints warm."""

    worker_id: str
    audit: AuditLog
    store: ObjectStore
    engine: Engine
    limits: WorkerLimits
    foreign: ForeignObjects = field(default_factory=ForeignObjects)

    def run(
        self,
        *,
        campaign_id: int | None = None,
        until_idle: bool = True,
        deadline_s: float | None = None,
        stop: threading.Event | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> WorkerSummary:
        """Work until there is nothing left, ``deadline_s`` seconds passed, or ``stop`` is set.

        What was leased but not begun is given back. An error that is not ours ends the run, and the
        jobs it touched are leased alone from then on. ``on_progress`` hears how many jobs just ended.
        """
        deadline = time.monotonic() + deadline_s if deadline_s is not None else None
        bounds = _Bounds(campaign_id, until_idle, deadline, stop or threading.Event())
        return _Run(self, bounds, on_progress).execute()


@dataclass(slots=True)
class _Work:
    """One lease on its way through the stages; ``jobs`` and ``inputs`` stay in step.

    ``making`` are the fingerprints that others may wait for; ``waiting`` are jobs whose picture is being made for
    another job, here or in the lease before.
    """

    lease: Lease
    jobs: list[LeasedJob] = field(default_factory=list)
    making: set[str] = field(default_factory=set)
    waiting: list[LeasedJob] = field(default_factory=list)
    requests: list[PreparedRequest] = field(default_factory=list)
    inputs: list[Mapping[str, Json]] = field(default_factory=list)
    results: list[GeneratedImage | GenerationFailure] = field(default_factory=list)
    gpu_seconds: float = 0.0

    @property
    def share_s(self) -> float:
        """One job's share of the device's time."""
        return self.gpu_seconds / len(self.jobs)


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Whose jobs a run takes, and when it ends; ``deadline`` is on the monotonic clock."""

    campaign_id: int | None
    until_idle: bool
    deadline: float | None
    stop: threading.Event


class _Ended(Exception):  # noqa: N818 -- unwinds a stage; never leaves this module
    """The run is over: whatever this stage was waiting for will not come."""


class _Run:
    """The threads of one run: the caller's owns the device, one fetches ahead, one stores behind, one beats."""

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
        self._engine = str(worker.engine.describe()["engine"])
        self._on_the_way: set[str] = set()
        self._cursor = jobs.Cursor()
        self._counting = threading.Lock()
        self._ended_as = Counter[str]()
        self._batches = 0
        self._gpu_seconds = 0.0
        self._idle = False

    def execute(self) -> WorkerSummary:
        """Run all stages to their end; the first error of any of them is raised."""
        try:
            with ThreadPoolExecutor(3, thread_name_prefix="sdp-worker") as pool:
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
        return WorkerSummary(
            succeeded=self._ended_as["succeeded"],
            reused=self._ended_as["reused"],
            failed=self._ended_as["failed"],
            batches=self._batches,
            gpu_seconds=self._gpu_seconds,
            idle=self._idle,
        )

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
        """Leases that are still open: as after a crash if there was one, else as if never taken."""
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

    # Leasing and fetching, one batch ahead of the device.

    def _fetch(self) -> None:
        poll_s = POLL_S
        while not self._over():
            lease = self._lease()
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
        late = self.bounds.deadline is not None and time.monotonic() >= self.bounds.deadline
        return late or self.stop.is_set() or self._ended.is_set()

    def _lease(self) -> Lease | None:
        lease = self._when_database_answers(self._take_lease)
        if lease is not None:
            self._leases[lease.id] = lease
        return lease

    def _take_lease(self) -> Lease | None:
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
            return jobs.take_lease(
                tx,
                worker_id=self.worker.worker_id,
                limit=limits.max_batch,
                ttl_s=limits.lease_ttl_s,
                campaign_id=self.bounds.campaign_id,
                resident=self.worker.engine.resident(),
                full_only=bool(self._leases),
                cursor=self._cursor,
            )

    def _work_left(self) -> bool:
        def ask() -> bool:
            with self.worker.audit.database.read() as connection:
                return reports.work_left(connection, self.bounds.campaign_id)

        return self._when_database_answers(ask)

    def _prepared(self, lease: Lease) -> _Work:
        """Fetch and decode what the jobs consume; a job whose input is wrong fails here, alone."""
        work = _Work(lease)
        for leased in self._to_make(work):
            try:
                fetched = self._when_storage_answers(lease, partial(self._fetch_inputs, leased))
            except SdpError as error:
                self._fail(lease, leased, error)
            else:
                work.jobs.append(leased)
                work.requests.append(fetched.prepared)
                work.inputs.append(fetched.inputs)
        return work

    def _fetch_inputs(self, leased: LeasedJob) -> delivery.Fetched:
        worker = self.worker
        return delivery.fetch(worker.store, worker.foreign, leased, max_pixels=worker.limits.max_pixels)

    # Delivering what was made before.

    def _to_make(self, work: _Work) -> Iterator[LeasedJob]:
        """The lease's jobs but those whose picture is there, which are delivered, or on its way, which wait for it.

        Equal jobs that two workers lease at the same time are made by both.
        """
        lease = work.lease
        # Asked before the pictures are looked up: what is finished in between is then found later, not made again.
        ahead = set(self._on_the_way)
        there = self._originals([leased for leased in lease.jobs if leased.fingerprint not in ahead])
        for leased in lease.jobs:
            if not _may_reuse(leased):
                yield leased
            elif leased.fingerprint in ahead:
                work.waiting.append(leased)
            elif not self._reused(lease, leased, there):
                ahead.add(leased.fingerprint)
                work.making.add(leased.fingerprint)
                self._on_the_way.add(leased.fingerprint)
                yield leased

    def _originals(self, wanted: Sequence[LeasedJob]) -> Mapping[str, Original]:
        """Pictures that were made for such jobs, by fingerprint."""
        fingerprints = {leased.fingerprint for leased in wanted if _may_reuse(leased)}

        def ask() -> Mapping[str, Original]:
            with self.worker.audit.database.read() as connection:
                return originals.newest(connection, team=wanted[0].team, fingerprints=fingerprints)

        return self._when_database_answers(ask) if fingerprints else {}

    def _reused(self, lease: Lease, leased: LeasedJob, there: Mapping[str, Original]) -> bool:
        """Deliver a copy of a picture; False where there is none, or not as it was recorded: then it must be made."""
        original = there.get(leased.fingerprint)
        if original is None:
            return False
        attempt = self._attempt(lease, leased, gpu_seconds=0.0)
        try:
            stored = self._when_storage_answers(
                lease, partial(delivery.reuse, self.worker.store, leased, original, attempt, engine=self._engine)
            )
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
        while (work := self._take(self._fetched)) is not None:
            if self.stop.is_set():
                continue
            if work.requests and self._still_ours(work.lease):
                started = time.perf_counter()
                batch = Batch(requests=work.requests, bucket=bucket_for(len(work.requests)))
                work.results = list(self.worker.engine.generate(batch))
                work.requests = []  # decoded inputs are large, and the record needs them no more
                work.gpu_seconds = time.perf_counter() - started
                self._gpu_seconds += work.gpu_seconds
                self._batches += 1
            self._hand_on(self._generated, work)
        self._hand_on(self._generated, None)

    def _still_ours(self, lease: Lease) -> bool:
        """Asked before each forward pass, so that a cancelled batch is not begun."""
        if not self._when_database_answers(partial(self._heartbeat, (lease.id,))):
            self._lost.add(lease.id)
        return lease.id not in self._lost

    # Encoding, storing and completing, behind the device.

    def _store(self) -> None:
        while (work := self._take(self._generated)) is not None:
            for leased, inputs, result in zip(work.jobs, work.inputs, work.results, strict=False):
                if work.lease.id in self._lost:
                    break
                if isinstance(result, GenerationFailure):
                    self._fail(work.lease, leased, result.error, gpu_seconds=work.share_s)
                else:
                    self._deliver(work, leased, inputs, result)
            self._finish(work)

    def _finish(self, work: _Work) -> None:
        self._on_the_way -= work.making
        if work.waiting and work.lease.id not in self._lost:
            self._deliver_waiting(work)
        self._close(work.lease)

    def _deliver(self, work: _Work, leased: LeasedJob, inputs: Mapping[str, Json], generated: GeneratedImage) -> None:
        attempt = self._attempt(work.lease, leased, gpu_seconds=work.share_s)
        try:
            # Once, not at each try to store it: what an outage left half stored would be met with other bytes.
            picture = delivery.finish(leased, inputs, generated, attempt)
            stored = self._when_storage_answers(work.lease, partial(delivery.deliver, self.worker.store, picture))
        except SdpError as error:
            self._fail(work.lease, leased, error, gpu_seconds=work.share_s)
        else:
            self._complete(work.lease, leased, stored)

    def _deliver_waiting(self, work: _Work) -> None:
        """Copies of what was made meanwhile; jobs whose picture was not made after all are given back."""
        there = self._originals(work.waiting)
        left = [leased for leased in work.waiting if not self._reused(work.lease, leased, there)]

        def give_back() -> None:
            with self.worker.audit.transaction() as tx:
                jobs.release(tx, lease_id=work.lease.id)

        if left:
            self._when_database_answers(give_back)

    def _attempt(self, lease: Lease, leased: LeasedJob, *, gpu_seconds: float) -> delivery.Attempt:
        return delivery.Attempt(
            number=leased.attempt, lease_id=lease.id, worker_id=self.worker.worker_id, gpu_seconds=gpu_seconds
        )

    def _complete(self, lease: Lease, leased: LeasedJob, stored: StoredImage) -> None:
        def complete() -> bool:
            with self.worker.audit.transaction() as tx:
                charge = self._charge(stored.gpu_seconds)
                return jobs.complete(tx, lease_id=lease.id, leased=leased, stored=stored, charge=charge)

        if self._when_database_answers(complete):
            self._count(*(("succeeded",) if stored.reused_from is None else ("succeeded", "reused")))
        else:
            _log.warning("lease_lost", job_id=leased.id, attempt=leased.attempt)

    def _fail(self, lease: Lease, leased: LeasedJob, error: SdpError, *, gpu_seconds: float = 0.0) -> None:
        status = next_status(error, attempt=leased.attempt, max_attempts=leased.max_attempts)
        backoff = backoff_s(leased.attempt, random.Random())  # noqa: S311

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
                    backoff_s=backoff,
                )

        done = self._when_database_answers(fail)
        _log.warning("attempt_failed", job_id=leased.id, attempt=leased.attempt, status=str(status), error=str(error))
        if done and status is Status.FAILED:
            self._count("failed")

    def _charge(self, gpu_seconds: float) -> budgets.Charge:
        cost = gpu_seconds * self.worker.limits.gpu_second_cost
        return budgets.Charge(worker_id=self.worker.worker_id, gpu_seconds=gpu_seconds, cost=cost)

    def _close(self, lease: Lease) -> None:
        def close() -> None:
            with self.worker.audit.database.write() as connection:
                jobs.close_lease(connection, lease.id)

        self._when_database_answers(close)
        self._leases.pop(lease.id, None)

    def _count(self, *outcomes: str) -> None:
        """One job ended; jobs end where pictures are fetched and where they are stored, on two threads."""
        with self._counting:
            self._ended_as.update(outcomes)
        if self.on_progress is not None:
            self.on_progress(1)

    # Staying alive.

    def _beat(self) -> None:
        """Extend open leases four times in their life; a lease that is not there any more is lost."""
        while not self._ended.wait(self.worker.limits.lease_ttl_s / 4):
            held = tuple(self._leases)
            try:
                alive = self._heartbeat(held)
            except DatabaseUnavailableError as error:
                _log.warning("heartbeat_failed", error=str(error))
                continue
            # One that was closed in order meanwhile is no longer held.
            self._lost |= {lease_id for lease_id in held if lease_id not in alive and lease_id in self._leases}

    def _heartbeat(self, lease_ids: Collection[str]) -> frozenset[str]:
        with self.worker.audit.database.write() as connection:
            workers.seen(connection, self.worker.worker_id)
            return jobs.heartbeat(connection, lease_ids, ttl_s=self.worker.limits.lease_ttl_s)

    def _when_storage_answers(self, lease: Lease, ask: Callable[[], _T]) -> _T:
        """Wait out a storage outage while the lease lives: its jobs are not to blame."""
        pause_s = 1.0
        while True:
            try:
                answer = ask()
            except StorageUnavailableError as error:
                _log.warning("storage_unavailable", error=str(error), retry_in_s=pause_s)
                self._note(f"waits for storage: {error}")
                self._pause(pause_s, error)
                if lease.id in self._lost:
                    raise LeaseLostError("storage did not answer while the lease lived") from error
                pause_s = min(LONGEST_OUTAGE_PAUSE_S, pause_s * 2)
            else:
                if pause_s > 1.0:
                    self._note(None)
                return answer

    def _when_database_answers(self, ask: Callable[[], _T]) -> _T:
        """Wait out a database outage. Every transition is fenced, so asking twice does no harm."""
        pause_s = 0.5
        while True:
            try:
                return ask()
            except DatabaseUnavailableError as error:
                _log.warning("database_unavailable", error=str(error), retry_in_s=pause_s)
                self._pause(pause_s, error)
                pause_s = min(LONGEST_OUTAGE_PAUSE_S, pause_s * 2)

    def _pause(self, pause_s: float, error: SdpError) -> None:
        if self._ended.wait(pause_s) or self.stop.is_set():
            raise _Ended from error

    def _note(self, note: str | None) -> None:
        def write() -> None:
            with self.worker.audit.database.write() as connection:
                workers.note(connection, self.worker.worker_id, note)

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
    return bool(leased.rules.get("reuse", True))


def _first_error(*stages: Future[None]) -> None:
    for stage in stages:
        stage.result()
