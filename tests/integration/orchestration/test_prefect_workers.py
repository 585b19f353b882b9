"""A campaign's workers on a real Prefect server: while it is paused, and after a user deleted their runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import filters
from prefect.states import Completed

from sdpipeline import orchestration
from sdpipeline.app import services
from sdpipeline.flows.gpu_worker import gpu_worker
from sdpipeline.orchestration import prefect_workers
from sdpipeline.orchestration.local_server import own_server
from sdpipeline.orchestration.prefect_workers import WORKER_DEPLOYMENT, Bounds, PrefectWorkers
from sdpipeline.orchestration.supervision import MAX_RESTARTS
from tests.factories import progress

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

BUSY = progress(ready=4, leased=4, succeeded=8)
PAUSED = replace(BUSY, status="paused")


@dataclass
class Dispatched:
    """Two dispatched workers whose runs no `prefect worker` starts."""

    client: SyncPrefectClient
    fleet: PrefectWorkers

    def runs(self) -> list[FlowRun]:
        mine = filters.FlowRunFilter(tags=filters.FlowRunFilterTags(all_=[self.fleet.label]))
        return self.client.read_flow_runs(flow_run_filter=mine)

    def end_well(self) -> None:
        for run in self.runs():
            self.client.set_flow_run_state(run.id, Completed(), force=True)


@pytest.fixture(scope="module")
def client(prefect_home: Path) -> Iterator[SyncPrefectClient]:
    """A client of a server that has the workers' deployment."""
    with (
        own_server(prefect_home),
        orchestration.prefect_server(services.load_settings(prefect_home), always_own=True),
        get_client(sync_client=True) as client,
    ):
        made: UUID = client.create_deployment(client.create_flow(gpu_worker), WORKER_DEPLOYMENT.partition("/")[2])
        yield client
        client.delete_deployment(made)


@pytest.fixture
def dispatched(client: SyncPrefectClient) -> Dispatched:
    looks = itertools.count(step=60.0)
    bounds = Bounds(min_workers=2, max_workers=2, jobs_per_worker=4)
    label = f"fleet:{uuid4()}"
    here = Dispatched(client, PrefectWorkers(campaign="spring", label=label, bounds=bounds, clock=lambda: next(looks)))
    here.fleet.supervise(BUSY)
    assert len(here.runs()) == 2
    return here


def test_nobody_is_dispatched_to_a_paused_campaign_whose_last_batch_is_on_a_device(dispatched: Dispatched) -> None:
    for _ in range(2 * MAX_RESTARTS + 2):
        dispatched.end_well()
        dispatched.fleet.supervise(PAUSED)
    assert len(dispatched.runs()) == 2
    dispatched.fleet.supervise(BUSY)  # it is resumed, and workers that ended meanwhile do not count as dead
    assert len(dispatched.runs()) == 4
    assert dispatched.fleet._restarts.failures == 0


def test_a_run_that_somebody_deleted_is_replaced(dispatched: Dispatched) -> None:
    gone, _ = dispatched.runs()
    dispatched.client.delete_flow_run(gone.id)
    prefect_workers._cancel(dispatched.client, gone.id, "it was there when the others were listed")
    dispatched.fleet.supervise(BUSY)
    assert len(dispatched.runs()) == 2
    assert gone.id not in {run.id for run in dispatched.runs()}
    dispatched.fleet.stop()
    assert {run.state.name for run in dispatched.runs() if run.state} <= {"Cancelled", "Cancelling"}
