"""Dispatched workers of a deployed campaign: runs of the gpu-worker flow in the work pool ``gpu``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

import structlog

from sdpipeline.db.queries import Progress
from sdpipeline.errors import Mistake, SettingsError, WorkersLostError
from sdpipeline.orchestration.artifacts import best_effort
from sdpipeline.orchestration.local_workers import WorkerExit
from sdpipeline.orchestration.supervision import Restarts, left_work, worker_needed

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

WORKER_FLOW = "gpu-worker"
WORKER_DEPLOYMENT = "gpu-worker/gpu-worker"
SUPERVISE_EVERY_S = 3.0
"""Each check of the runs is a request to the Prefect server."""
SURPLUS_S = 60.0
"""How long a worker must be surplus before it is cancelled: starting it again costs loading a checkpoint."""
PAGE = 200

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Minimum and maximum number of a campaign's workers, and jobs per worker."""

    min_workers: int
    max_workers: int
    jobs_per_worker: int

    def wanted(self, workable: int) -> int:
        """Return the number of workers for this many ready or leased jobs."""
        return min(self.max_workers, max(self.min_workers, math.ceil(workable / self.jobs_per_worker)))


@dataclass(slots=True, kw_only=True)
class PrefectWorkers:
    """Autoscaler: keep as many worker runs alive as the backlog needs.

    It counts the runs of an earlier dispatcher of the same campaign, found by their unique ``label``. It ends only
    runs that it dispatched itself.
    """

    campaign: str
    label: str
    bounds: Bounds
    clock: Callable[[], float] = time.monotonic
    _finished_at_start: dict[UUID, int] = field(default_factory=dict)
    _starts: int = 0
    _restarts: Restarts = field(default_factory=Restarts)
    _last_message: str = ""
    _finished: int = 0
    _checked_at: float = -math.inf
    _surplus_since: float | None = None
    _was_empty: bool = False

    def start(self) -> None:
        """Raise SettingsError if no worker is deployed; :meth:`supervise` dispatches the workers."""
        from prefect.client.orchestration import get_client
        from prefect.exceptions import ObjectNotFound

        with get_client(sync_client=True) as client:
            try:
                client.read_deployment_by_name(WORKER_DEPLOYMENT)
            except ObjectNotFound as error:
                missing = Mistake(message=f"no deployment {WORKER_DEPLOYMENT}", fix="sdpipeline deploy")
                raise SettingsError(missing) from error

    def supervise(self, progress: Progress) -> None:
        """Scale to the backlog: dispatch missing workers, replace dead ones, and cancel those that stay surplus."""
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

        if self.clock() - self._checked_at < SUPERVISE_EVERY_S:
            return
        self._checked_at = self.clock()
        wanted = self.bounds.wanted(progress.ready + progress.leased)
        # A retry is cheaper than the traces of half a dispatch; an unreachable server is asked again soon.
        with best_effort(), temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 2}), get_client(sync_client=True) as client:
            active = _active_runs(client, self.label)
            if progress.status == "paused":
                self._forget_ended({run.id for run in active})
                return
            self._count_failed_runs(client, {run.id for run in active}, progress)
            if self._restarts.exhausted(workers=wanted):
                why = f": {self._last_message}" if self._last_message else ""
                count = self._restarts.failures
                raise WorkersLostError(f"{count} workers of {self.campaign} ended without finishing a job{why}")
            # Workers that just ended may have finished the jobs leased a moment ago, so one check alone does not count.
            needed = worker_needed(progress, alone=self._was_empty and not active)
            self._was_empty = not active
            for _ in range(wanted - len(active) if needed else 0):
                self._dispatch(progress)
            self._stop_surplus(client, active, wanted)

    def wait(self, timeout_s: float) -> None:
        """Sleep for the whole timeout, because the end of a remote run sends no signal."""
        time.sleep(timeout_s)

    def finish(self, timeout_s: float) -> Sequence[WorkerExit]:  # noqa: ARG002 - remote workers end by themselves
        """Cancel the runs that have not started; the others end by themselves."""
        self._end(lambda run: run.start_time is None, "no work is left")
        return ()

    def stop(self) -> Sequence[WorkerExit]:
        """Cancel every run dispatched here; its worker releases its leases within a batch."""
        self._end(lambda _: True, "the campaign's run ended")
        return ()

    def _dispatch(self, progress: Progress) -> None:
        from prefect.context import TagsContext
        from prefect.deployments import run_deployment

        run: Any = run_deployment(
            WORKER_DEPLOYMENT,
            parameters={"campaign": self.campaign},
            timeout=0,
            flow_run_name=f"{self.campaign} · worker {self._starts}",
            tags=sorted({*TagsContext.get().current_tags, self.label}),
        )
        log.info("worker_dispatched", name=run.name, flow_run=str(run.id))
        self._starts += 1
        self._finished_at_start[run.id] = progress.finished

    def _forget_ended(self, active: set[UUID]) -> None:
        """Forget ended runs without counting deaths: workers of a paused campaign find nothing to do."""
        for run_id in self._finished_at_start.keys() - active:
            del self._finished_at_start[run_id]

    def _count_failed_runs(self, client: SyncPrefectClient, active: set[UUID], progress: Progress) -> None:
        """Count the ended runs that died. Runs replace each other, so that one finished job clears the count."""
        if progress.finished > self._finished:
            self._finished = progress.finished
            self._restarts.reset()
        for run_id in self._finished_at_start.keys() - active:
            untouched = left_work(progress, finished_at_start=self._finished_at_start.pop(run_id))
            state = _state(client, run_id)
            if state is not None and (state.is_crashed() or state.is_failed() or (state.is_completed() and untouched)):
                log.warning("worker_died", flow_run=str(run_id), state=state.name, message=state.message)
                self._restarts.record_exit()
                self._last_message = state.message or self._last_message

    def _stop_surplus(self, client: SyncPrefectClient, active: Sequence[FlowRun], wanted: int) -> None:
        """Scale in: cancel pending runs first and at once, running ones only after SURPLUS_S, newest first."""
        surplus = len(active) - wanted
        if surplus <= 0:
            self._surplus_since = None
            return
        self._surplus_since = self.clock() if self._surplus_since is None else self._surplus_since
        waiting = self.clock() - self._surplus_since < SURPLUS_S
        oldest_first = {run_id: n for n, run_id in enumerate(self._finished_at_start)}
        mine = [run for run in active if run.id in oldest_first]
        mine.sort(key=lambda run: (run.start_time is not None, -oldest_first[run.id]))
        for run in mine[:surplus]:
            if run.start_time is None or not waiting:
                _cancel(client, run.id, "surplus worker: too few jobs are left")

    def _end(self, which: Callable[[FlowRun], bool], why: str) -> None:
        from prefect.client.orchestration import get_client

        with best_effort(), get_client(sync_client=True) as client:
            for run in _active_runs(client, self.label):
                if run.id in self._finished_at_start and which(run):
                    _cancel(client, run.id, why)


def _active_runs(client: SyncPrefectClient, label: str) -> list[FlowRun]:
    """Return the unfinished worker runs of a campaign, by any dispatcher."""
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import TERMINAL_STATES, StateType

    unfinished = filters.FlowRunFilterStateType(any_=[kind for kind in StateType if kind not in TERMINAL_STATES])
    chosen = filters.FlowRunFilter(
        tags=filters.FlowRunFilterTags(all_=[label]), state=filters.FlowRunFilterState(type=unfinished)
    )
    flow = filters.FlowFilter(name=filters.FlowFilterName(any_=[WORKER_FLOW]))
    found: list[FlowRun] = []
    while len(page := client.read_flow_runs(flow_filter=flow, flow_run_filter=chosen, limit=PAGE, offset=len(found))):
        found += page
        if len(page) < PAGE:
            break
    return found


def _state(client: SyncPrefectClient, run_id: UUID) -> State[Any] | None:
    """Return the run's state; None if the run was deleted, so that it has ended without a known result."""
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_flow_run(run_id).state
    except ObjectNotFound:
        return None


def _cancel(client: SyncPrefectClient, run_id: UUID, why: str) -> None:
    """Cancel a run: a running one ends in order, a pending one at once; a deleted run has ended already."""
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Cancelling

    with suppress(ObjectNotFound):
        client.set_flow_run_state(run_id, Cancelling(message=why))
