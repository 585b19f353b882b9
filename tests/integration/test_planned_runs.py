"""A Prefect server beside us plans the runs of a schedule, whatever SQLAlchemy it finds."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule

from sdpipeline import orchestration
from sdpipeline.app import services
from sdpipeline.flows.maintenance import seal
from sdpipeline.orchestration.local_server import own_server


def test_a_schedules_runs_are_planned(prefect_home: Path) -> None:
    with (
        own_server(prefect_home),
        orchestration.prefect_server(services.load_settings(prefect_home), always_own=True),
        get_client(sync_client=True) as client,
    ):
        hourly = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 * * * *"), active=True)
        deployment = client.create_deployment(client.create_flow(seal), "planned", schedules=[hourly])
        try:
            ends_at = time.monotonic() + 60
            while not (planned := _planned(deployment)):
                assert time.monotonic() < ends_at, "no run was planned"
                time.sleep(0.2)
        finally:
            client.delete_deployment(deployment)
    assert min(planned) - datetime.now(UTC) <= timedelta(hours=1)


def _planned(deployment: UUID) -> list[datetime]:
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

    with get_client(sync_client=True) as client:
        chosen = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
        runs = client.read_flow_runs(deployment_filter=chosen)
    return [run.expected_start_time for run in runs if run.expected_start_time is not None]
