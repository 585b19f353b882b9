"""The file of deployments names existing flows, pools that are created, and valid schedules."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint

from sdpipeline.campaigns import schedule
from sdpipeline.orchestration.deploy import CAMPAIGN_QUEUE, FLOWS, POOLS
from sdpipeline.orchestration.prefect_workers import Bounds

FILE: dict[str, Any] = yaml.safe_load((files("sdpipeline.orchestration") / "prefect.yaml").read_text(encoding="utf-8"))
DEPLOYMENTS = {each["name"]: each for each in FILE["deployments"]}


def test_nothing_is_pulled_and_every_flow_is_deployed_under_its_own_name() -> None:
    assert FILE["pull"] == []
    flows = {name: load_flow_from_entrypoint(each["entrypoint"]).name for name, each in DEPLOYMENTS.items()}
    assert flows == {name: name for name in FLOWS}


@pytest.mark.parametrize("deployment", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
def test_a_deployment_runs_in_a_pool_that_is_made_at_times_that_come(deployment: dict[str, Any]) -> None:
    assert deployment["work_pool"]["name"] in POOLS
    for each in deployment.get("schedules", ()):
        schedule.check_cron(each["cron"])
        assert each["active"]


def test_campaigns_wait_in_the_queue_that_is_limited_and_maintenance_does_not() -> None:
    queues = {name: each["work_pool"].get("work_queue_name") for name, each in DEPLOYMENTS.items()}
    assert [name for name, queue in queues.items() if queue == CAMPAIGN_QUEUE] == ["campaign"]


@pytest.mark.parametrize(("workable", "workers"), [(0, 2), (128, 2), (129, 3), (10_000, 5)])
def test_a_backlog_is_worth_workers_within_bounds(workable: int, workers: int) -> None:
    assert Bounds(min_workers=2, max_workers=5, jobs_per_worker=64).wanted(workable) == workers
