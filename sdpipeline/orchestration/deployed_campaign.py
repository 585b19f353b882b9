"""Deployed campaign flow: submit the request and dispatch Prefect workers for it."""

from __future__ import annotations

import threading
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from sdpipeline.app import submit as app_submit
from sdpipeline.app.control import reopen
from sdpipeline.app.queries import unfinished_campaigns
from sdpipeline.app.services import Services, open_services
from sdpipeline.db.submit import Submitted
from sdpipeline.db.waiting import until_available
from sdpipeline.orchestration import campaign_run, worker_process
from sdpipeline.orchestration.campaign_request import CampaignRequest, Reopen
from sdpipeline.orchestration.prefect_workers import Bounds, PrefectWorkers
from sdpipeline.settings import Settings

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

CAMPAIGN_DEPLOYMENT = "campaign/campaign"

log = structlog.get_logger(__name__)


def run_request(settings: Settings, request: CampaignRequest) -> State[Any]:
    """Run the requested campaign to its end; return the final state of the flow run. Called inside that run."""
    name = _submitted(settings, request)
    with open_services(settings, create=False, until=threading.Event()) as services:
        if name is None:
            return _start_unfinished_campaigns(services)
        if request.reopen is not Reopen.NOTHING:
            reopened, _ = until_available(partial(reopen, services, name, request.reopen))
            log.info("jobs_reopened", campaign=name, status=str(request.reopen), jobs=reopened)
        label = f"fleet:{settings.team}/{name}"
        workers = PrefectWorkers(campaign=name, label=label, bounds=_bounds(settings, request))
        with worker_process.state_of_the_server():
            return campaign_run.run_workers(services, name, workers)


def _submitted(settings: Settings, request: CampaignRequest) -> str | None:
    """Submit the campaign file, if any, and return the campaign's name.

    The edition follows the time the schedule fired, not the current time.
    """
    from prefect.logging import get_run_logger

    if request.file is None and request.text is None:
        return request.campaign
    with app_submit.campaign_file(settings, url=request.file, text=request.text) as file:
        name, done = until_available(partial(_submit, settings, file, request))
    if done.left_out:
        get_run_logger().warning("%s: %s", name, done.left_out)
    return name


def _submit(settings: Settings, file: Path, request: CampaignRequest) -> tuple[str, Submitted]:
    edition, now = request.edition, _fired_at()
    with app_submit.open_to_submit(settings, file, edition=edition, now=now) as services:
        return app_submit.submit(services, file, prune=request.prune, edition=edition, now=now)


def _fired_at() -> datetime | None:
    from prefect.runtime import flow_run

    scheduled: datetime | None = flow_run.get_scheduled_start_time()
    return scheduled


def _bounds(settings: Settings, request: CampaignRequest) -> Bounds:
    least = request.min_workers or settings.dispatch.min_workers
    most = request.max_workers or settings.dispatch.max_workers
    return Bounds(min_workers=min(least, most), max_workers=most, jobs_per_worker=settings.dispatch.jobs_per_worker)


def _start_unfinished_campaigns(services: Services) -> State[Any]:
    """Start a run for every campaign with work left and no unfinished run."""
    from prefect.deployments import run_deployment
    from prefect.states import Completed

    team = services.settings.team
    idle = [name for name in unfinished_campaigns(services) if not _has_run(team, name)]
    for name in idle:
        run_deployment(
            CAMPAIGN_DEPLOYMENT,
            parameters={"request": CampaignRequest(campaign=name).document()},
            timeout=0,
            as_subflow=False,  # it outlives this run and is cancelled separately
            flow_run_name=name,
            tags=[f"campaign:{name}", f"team:{team}"],
        )
    return Completed(message=f"started: {', '.join(idle)}" if idle else "no work is left")


def _has_run(team: str, name: str) -> bool:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import TERMINAL_STATES, StateType

    unfinished = filters.FlowRunFilterStateType(any_=[kind for kind in StateType if kind not in TERMINAL_STATES])
    with get_client(sync_client=True) as client:
        return bool(
            client.read_flow_runs(
                flow_filter=filters.FlowFilter(name=filters.FlowFilterName(any_=["campaign"])),
                flow_run_filter=filters.FlowRunFilter(
                    tags=filters.FlowRunFilterTags(all_=[f"campaign:{name}", f"team:{team}"]),
                    state=filters.FlowRunFilterState(type=unfinished),
                ),
                limit=1,
            )
        )
