"""Deployment to a Prefect server: work pools, deployments, campaign schedules, and an automation for lost runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any

from sdpipeline.campaigns.spec import Schedule
from sdpipeline.domain import Json
from sdpipeline.errors import Mistake, OrchestratorUnavailableError, SettingsError
from sdpipeline.orchestration import prefect_server
from sdpipeline.orchestration.campaign_request import CampaignRequest
from sdpipeline.orchestration.deployed_campaign import CAMPAIGN_DEPLOYMENT
from sdpipeline.settings import Settings

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.events.schemas.automations import AutomationCore

POOLS = ("cpu", "gpu")
CAMPAIGN_QUEUE = "campaigns"
FLOWS = ("campaign", "gpu-worker", "reclaim", "seal", "reconcile", "retention", "audit-verify")
AUTOMATION = "sdpipeline: a run that is silent has crashed"
SILENCE_S = 90.0
"""Three heartbeats at thirty seconds, Prefect's shortest interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """Objects that a server now has of this deployment."""

    pools: Sequence[str]
    deployments: Sequence[str]
    automation: str
    campaign_limit: int | None

    def document(self) -> Json:
        """Return the JSON of ``deploy --json``."""
        names = ("pools", "deployments", "automation", "campaign_limit")
        return {name: getattr(self, name) for name in names}


def deploy(settings: Settings, *, max_campaigns: int | None = None, silence_s: float = SILENCE_S) -> Deployed:
    """Create missing objects and update the rest; existing pools stay as they are, as does a limit that is not given.

    At most ``max_campaigns`` campaign runs execute at a time (0 is no limit); the others wait in their queue. A run
    that sent no heartbeat for ``silence_s`` seconds is marked Crashed.
    """
    with _server(settings) as client:
        _make_pools(client)
        limit = _limit_campaigns(client, max_campaigns)
        _deploy_file()
        _automate(client, silence_s)
        return Deployed(pools=POOLS, deployments=_deployments(client), automation=AUTOMATION, campaign_limit=limit)


def schedule(settings: Settings, name: str, when: Schedule, request: CampaignRequest) -> str:
    """Schedule a campaign in a separate deployment; return the deployment's name.

    It is the deployed campaign flow with other parameters. As a separate deployment it survives deploying again, and a
    person can pause it in the UI.
    """
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule

    with _server(settings) as client:
        base = _campaign_deployment(client)
        client.create_deployment(
            flow_id=base.flow_id,
            name=_scheduled(settings, name),
            description=f"Runs the campaign {name} of the team {settings.team} on its schedule.",
            entrypoint=base.entrypoint,
            pull_steps=base.pull_steps,
            parameter_openapi_schema=base.parameter_openapi_schema,
            enforce_parameter_schema=base.enforce_parameter_schema,
            job_variables=base.job_variables,
            work_pool_name=base.work_pool_name,
            work_queue_name=base.work_queue_name,
            parameters={"request": request.document()},
            tags=["sdpipeline", f"schedule:{name}"],
            schedules=[
                DeploymentScheduleCreate(
                    schedule=CronSchedule(cron=when.cron, timezone=when.timezone), active=True, slug=name
                )
            ],
        )
    return f"campaign/{_scheduled(settings, name)}"


def unschedule(settings: Settings, name: str) -> bool:
    """Remove a campaign's schedule and its planned runs; return True if there was one."""
    from prefect.exceptions import ObjectNotFound

    with _server(settings) as client:
        try:
            found = client.read_deployment_by_name(f"campaign/{_scheduled(settings, name)}")
        except ObjectNotFound:
            return False
        client.delete_deployment(found.id)
        return True


def _scheduled(settings: Settings, name: str) -> str:
    """Return a deployment name that cannot clash with another team's or with prefect.yaml's: campaign names have no
    dots."""
    return f"{settings.team}.{name}"


@contextmanager
def _server(settings: Settings) -> Iterator[SyncPrefectClient]:
    from prefect.client.orchestration import get_client

    if settings.prefect_api_url is None:
        message = "is not set; schedules need a permanent Prefect server"
        raise SettingsError(Mistake(key="PREFECT_API_URL", message=message, fix="http://HOST:4200/api"))
    with prefect_server(settings), get_client(sync_client=True) as client:
        yield client


def _make_pools(client: SyncPrefectClient) -> None:
    """Create missing work pools of type process; pools created earlier, for example of pods, stay."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    for name in POOLS:
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            template = ProcessWorker.get_default_base_job_template()
            client.create_work_pool(WorkPoolCreate(name=name, type=ProcessWorker.type, base_job_template=template))


def _limit_campaigns(client: SyncPrefectClient, most: int | None) -> int | None:
    from prefect.exceptions import ObjectNotFound

    try:
        queue = client.read_work_queue_by_name(CAMPAIGN_QUEUE, work_pool_name=POOLS[0])
    except ObjectNotFound:
        queue = client.create_work_queue(CAMPAIGN_QUEUE, work_pool_name=POOLS[0])
    if most is None:
        return queue.concurrency_limit
    client.update_work_queue(queue.id, concurrency_limit=most or None)
    return most or None


def _deploy_file() -> None:
    """Deploy prefect.yaml by Prefect's own command, so that typing the command has the same effect."""
    with as_file(files("sdpipeline.orchestration") / "prefect.yaml") as file:
        words = ["--no-prompt", "deploy", "--prefect-file", str(file), "--all"]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "prefect", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"PYTHONIOENCODING": "utf-8"},
            check=False,
        )
    if done.returncode:
        raise OrchestratorUnavailableError(f"prefect {' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def _automate(client: SyncPrefectClient, silence_s: float) -> None:
    wanted = _for_silent_runs(silence_s)
    for known in client.read_automations_by_name(AUTOMATION):
        client.update_automation(known.id, wanted)
        return
    client.create_automation(wanted)


def _for_silent_runs(silence_s: float) -> AutomationCore:
    """Return the automation for runs whose heartbeats end, as after a process was killed together with its worker."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    flow = {"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)}
    return AutomationCore(
        name=AUTOMATION,
        description="A run that sent heartbeats and then nothing for a while is marked Crashed.",
        trigger=EventTrigger(
            match=ResourceSpecification.model_validate({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification.model_validate(flow),
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=silence_s),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=f"no heartbeat for {silence_s:g} s")],
    )


def _campaign_deployment(client: SyncPrefectClient) -> DeploymentResponse:
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_deployment_by_name(CAMPAIGN_DEPLOYMENT)
    except ObjectNotFound as error:
        missing = Mistake(message=f"no deployment {CAMPAIGN_DEPLOYMENT}", fix="sdpipeline deploy")
        raise SettingsError(missing) from error


def _deployments(client: SyncPrefectClient) -> list[str]:
    """Return our deployments by the names that `prefect deployment run` takes."""
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    found: list[str] = []
    for flow in FLOWS:
        chosen: Any = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])))
        found += sorted(f"{flow}/{deployment.name}" for deployment in chosen)
    return found
