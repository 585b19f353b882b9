"""Campaign run: start workers, watch the database until the work is done, show progress, and end the workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

import structlog

from sdpipeline import shutdown
from sdpipeline.app.maintenance import release_worker_leases
from sdpipeline.app.queries import campaign_progress, checkpoint_aliases
from sdpipeline.app.sealing import seal_here
from sdpipeline.app.services import Services
from sdpipeline.db.queries import Progress
from sdpipeline.db.waiting import until_available
from sdpipeline.errors import DatabaseUnavailableError, TransientError
from sdpipeline.orchestration import local_workers
from sdpipeline.orchestration.artifacts import RunArtifacts, best_effort, describe
from sdpipeline.orchestration.local_server import answers
from sdpipeline.settings import Settings

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from prefect import Flow
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import State

POLL_S = 1.0
FINISH_GRACE_S = 60.0  # a replacement that is still starting ends as soon as it sees that nothing is left

log = structlog.get_logger(__name__)


class Workers(Protocol):
    """Workers of a campaign: processes on this machine, or flow runs that other machines execute."""

    def start(self) -> None:
        """Start the workers, or fail before there is anything to watch."""

    def supervise(self, progress: Progress) -> None:
        """Replace dead workers while work is left; raises WorkersLostError if that does not help."""

    def wait(self, timeout_s: float) -> None:
        """Sleep until the timeout or until a worker ends."""

    def finish(self, timeout_s: float) -> Sequence[local_workers.WorkerExit]:
        """Let workers end by themselves when nothing is left; return the local processes that had to be ended."""

    def stop(self) -> Sequence[local_workers.WorkerExit]:
        """End every worker; return the local processes that had to be ended."""


def create_local_workers(
    services: Services, campaign: str, *, worker_flow: Flow[..., Any]
) -> local_workers.LocalWorkers:
    """Return the local workers of a campaign: one process per device of this machine."""
    settings = services.settings
    return local_workers.LocalWorkers(
        slots=local_workers.slots(settings),
        spawn=lambda slot, name: _spawn(settings, campaign, worker_flow, slot, name),
        on_exit=lambda exited: _on_exit(services, campaign, exited),
        # A worker needs its own shutdown grace, and a moment to close its flow run.
        stop_grace_s=settings.shutdown_grace_s + shutdown.GIVING_BACK_S + local_workers.STOP_GRACE_S,
    )


def run_workers(services: Services, campaign: str, workers: Workers) -> State[None]:
    """Run a campaign's workers until the database says finished or paused, and publish progress.

    Returns the final state of the flow run. Called inside the campaign flow's run.
    """
    from prefect import tags

    progress = _progress(services, campaign)
    artifacts = RunArtifacts(services, campaign)
    labels = until_available(lambda: _tags(services, progress))
    artifacts.open(progress, labels)
    with tags(*labels):
        ended = _watch(services, campaign, workers, artifacts)
    try:
        seal_here(services)
    except TransientError as error:
        log.warning("seal_failed", error=str(error))  # the next seal covers these events too
    artifacts.close(ended)
    return closing_state(ended, began=progress)


def _watch(services: Services, campaign: str, workers: Workers, artifacts: RunArtifacts) -> Progress:
    try:
        workers.start()
        while True:
            try:
                progress = campaign_progress(services, campaign)
            except DatabaseUnavailableError as error:
                log.warning("database_unavailable", error=str(error))  # the workers also wait for it
                workers.wait(POLL_S)
                continue
            artifacts.show(progress)
            if not progress.remaining or (progress.status == "paused" and not progress.leased):
                break
            workers.supervise(progress)
            workers.wait(POLL_S)
        _close(services, campaign, workers.finish(_finish_grace_s()))
    except BaseException:  # Ctrl-C above all: however supervision ends, the workers end too
        _close(services, campaign, workers.stop())
        raise
    return _progress(services, campaign)


def _progress(services: Services, campaign: str) -> Progress:
    return until_available(lambda: campaign_progress(services, campaign))


def _release(services: Services, pid: int) -> int | None:
    """Release the leases of a dead worker; return None if the database is unavailable, so that they expire."""
    try:
        return release_worker_leases(services, pid)
    except DatabaseUnavailableError as error:
        log.warning("leases_left_to_expire", error=str(error), pid=pid)
        return None


def _finish_grace_s() -> float:
    """Return the grace for workers that have nothing left to do: none if the server is away.

    Workers that cannot report their end to the server would retry for a minute.
    """
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    reachable = url is None or any(answers(url, timeout_s=3.0) for _ in range(3))
    return FINISH_GRACE_S if reachable else 0.0


def _close(services: Services, campaign: str, stopped: Sequence[local_workers.WorkerExit]) -> None:
    """Release the leases of workers that had to be ended and cancel their runs.

    A worker that ended by itself on request has released its leases; one that was killed could not.
    """
    from prefect.states import Cancelled

    for worker in stopped:
        returned = _release(services, worker.pid)
        log.info("worker_stopped", name=worker.name, pid=worker.pid, leases_returned=returned)
        with best_effort():
            _close_run(f"{campaign} · {worker.name}", Cancelled(message="the campaign's run ended"))


def _spawn(
    settings: Settings, campaign: str, worker_flow: Flow[..., Any], slot: local_workers.Slot, name: str
) -> BaseProcess:
    from prefect.flow_engine import run_flow_in_subprocess

    (settings.home / "logs").mkdir(parents=True, exist_ok=True)
    return run_flow_in_subprocess(
        worker_flow.with_options(flow_run_name=f"{campaign} · {name}"),
        parameters={
            "campaign": campaign,
            "home": str(settings.home),
            "device": slot.device,
            "log_file": str(settings.home / "logs" / f"worker-{slot.index}.log"),
        },
        # A worker that starts while the server restarts retries for longer than the dispatcher may.
        env={**slot.environment, "PREFECT_CLIENT_MAX_RETRIES": "5"},
    )


def _on_exit(services: Services, campaign: str, exited: local_workers.WorkerExit) -> None:
    """Release the leases of a dead worker and mark its run as Crashed."""
    from prefect.states import Crashed

    returned = _release(services, exited.pid)
    log.warning("worker_died", name=exited.name, pid=exited.pid, exit_code=exited.exit_code, leases_returned=returned)
    with best_effort():
        _close_run(f"{campaign} · {exited.name}", Crashed(message=str(exited)))


def _close_run(name: str, state: State[Any]) -> None:
    """Force this run's child of that name, and its tasks, into ``state`` unless it is completed."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas import filters
    from prefect.runtime import flow_run

    child = filters.FlowRunFilter(
        parent_flow_run_id=filters.FlowRunFilterParentFlowRunId(any_=[UUID(flow_run.get_id())]),
        name=filters.FlowRunFilterName(any_=[name]),
    )
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=child):
            if run.state is None or not run.state.is_completed():
                _close_tasks(client, run.id, state)
                client.set_flow_run_state(run.id, state, force=True)


def _close_tasks(client: SyncPrefectClient, run_id: UUID, state: State[Any]) -> None:
    from prefect.client.schemas import filters

    of_run = filters.FlowRunFilter(id=filters.FlowRunFilterId(any_=[run_id]))
    for task_run in client.read_task_runs(flow_run_filter=of_run):
        if task_run.state is None or not task_run.state.is_final():
            client.set_task_run_state(task_run.id, state, force=True)


def closing_state(progress: Progress, *, began: Progress) -> State[Any]:
    """Return the final state of a campaign's run.

    It is Failed with its counts if `run` would exit with 3, and Cancelled if someone cancelled the campaign. A version
    submitted meanwhile may cancel jobs too (`--prune`); its campaign goes on.
    """
    from prefect.states import Cancelled, Completed, Failed

    if progress.status == "paused" and progress.remaining:
        why = f" ({progress.paused_because})" if progress.paused_because else ""
        return Completed(name="Paused", message=f"paused with {progress.remaining} of {progress.total} jobs to do{why}")
    if progress.failed or progress.blocked:
        return Failed(message=describe(progress))
    cancelled = progress.cancelled > began.cancelled and progress.version == began.version
    if cancelled or (progress.cancelled and not progress.total):
        return Cancelled(message=describe(progress))
    return Completed(message=describe(progress))


def _tags(services: Services, progress: Progress) -> Sequence[str]:
    """Return tags for the campaign, its team and its checkpoints, by their user-facing names."""
    own = (f"campaign:{progress.name}", f"team:{services.settings.team}")
    return [*own, *(f"checkpoint:{alias}" for alias in checkpoint_aliases(services, progress.id))]
