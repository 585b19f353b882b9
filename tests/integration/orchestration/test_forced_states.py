"""Forced run states that name a result: nothing of the result is read, however a flow starts."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from prefect import __version__ as installed

from sdpipeline import orchestration
from sdpipeline.app.services import open_services
from sdpipeline.errors import ForeignResultError, RunForcedError
from sdpipeline.orchestration.local_server import own_server
from sdpipeline.settings import Settings
from tests.conftest import copied_into
from tests.integration.commands import document, environment, prefect
from tests.integration.conftest import free_port, served

pytestmark = pytest.mark.timeout(300)

CAMPAIGN = """\
name: spring
checkpoint: shapes
seeds: {start: 0, count: 2}
stages:
  - {id: draft, task: text-to-image, prompt: a red circle}
"""


BUSY = 503
"""The answer of a Prefect server whose SQLite database is locked."""


class Execute:
    """Creates a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.makedirs, (str(self.trace),)


@dataclass(frozen=True)
class Server:
    """A Prefect server, with the environment of its users."""

    told: dict[str, str]

    def ask(self, what: str, **body: Any) -> Any:
        user, _, password = self.told.get("PREFECT_API_AUTH_STRING", ":").partition(":")
        url = f"{self.told['PREFECT_API_URL']}/{what}"
        while (answer := httpx.post(url, json=body, auth=(user, password), timeout=30)).status_code == BUSY:
            time.sleep(0.2)
        return answer.raise_for_status().json()

    def pending(self, flow: str, **parameters: str) -> str:
        """A new run of the flow of that name, by a deployment that `prefect flow-run execute` can start."""
        flow_id = self.ask("flows/", name=flow)["id"]
        entry = f"sdpipeline.flows.{'gpu_worker.gpu_worker' if flow == 'gpu-worker' else 'maintenance.seal'}"
        deployed = self.ask("deployments/", name=flow, flow_id=flow_id, entrypoint=entry, pull_steps=[])["id"]
        pending = {"type": "PENDING"}
        run = self.ask("flow_runs/", flow_id=flow_id, deployment_id=deployed, state=pending, parameters=parameters)
        return str(run["id"])

    def force(self, run: str, trace: Path, *, state: str = "COMPLETED") -> None:
        """Force the state as an attacker would: the run is completed, and its result is in this file."""
        data = {"storage_key": str(planted(trace)), "serializer": {"type": "pickle"}, "prefect_version": installed}
        self.ask(f"flow_runs/{run}/set_state", force=True, state={"type": state, "data": data})


def planted(trace: Path) -> Path:
    """A result record whose pickle leaves a trace."""
    blob = base64.encodebytes(pickle.dumps(Execute(trace))).decode()
    file = trace.with_suffix(".result")
    file.write_text(json.dumps({"metadata": {"serializer": {"type": "pickle"}}, "result": blob}))
    return file


@pytest.fixture(scope="module", params=["own", "named"])
def server(
    request: pytest.FixtureRequest,
    prefect_home: Path,
    prefect_database: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """Our own server, or a foreign one that PREFECT_API_URL names and that requires no password."""
    if request.param == "own":
        with own_server(prefect_home) as handle:
            yield Server(told=dict(handle.environment))
        return
    port, folder = free_port(), copied_into(tmp_path_factory.mktemp("named"), prefect_database)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with served(command, port, folder, environment=environment(PREFECT_HOME=str(folder))):
        yield Server(told={"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT_HOME": str(folder)})


@pytest.fixture
def told(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process connected to that server."""
    for name, value in server.told.items():
        monkeypatch.setenv(name, value)
    with orchestration.prefect_server(Settings(home=Path("unused"))):
        yield


def test_a_flow_run_in_this_process_reads_no_result(server: Server, told: None, tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.flow_engine import run_flow

    from sdpipeline.flows.maintenance import seal

    run = server.pending("seal")
    server.force(run, tmp_path / "trace")
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(UUID(run))
    with pytest.raises(ForeignResultError):
        run_flow(seal, flow_run=flow_run)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "state",
    ["COMPLETED", *(pytest.param(state, marks=pytest.mark.long) for state in ("FAILED", "CRASHED", "CANCELLED"))],
)
def test_no_state_of_a_server_is_read(server: Server, told: None, tmp_path: Path, state: str) -> None:
    from prefect.client.orchestration import get_client

    from sdpipeline.flows.maintenance import seal

    run = server.pending(seal.name)
    server.force(run, tmp_path / "trace", state=state)
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(UUID(run)).state
    assert found is not None
    for raising in (True, False):
        with pytest.raises(ForeignResultError):
            found.result(raise_on_failure=raising, retry_result_failure=False)
        with pytest.raises(ForeignResultError):
            asyncio.run(found.aresult(raise_on_failure=raising, retry_result_failure=False))
    assert not (tmp_path / "trace").exists()


def test_a_flow_run_in_a_process_of_its_own_reads_no_result(server: Server, told: None, tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.flow_engine import run_flow_in_subprocess

    from sdpipeline.flows.gpu_worker import gpu_worker

    log = tmp_path / "log"
    run = server.pending("gpu-worker", log_file=str(log))
    server.force(run, tmp_path / "trace")
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(UUID(run))
    process = run_flow_in_subprocess(gpu_worker.with_options(flow_run_name="worker 0"), flow_run=flow_run)
    process.join()
    assert process.exitcode is not None
    assert not (tmp_path / "trace").exists()


def test_run_says_that_its_run_was_ended_from_outside(
    server: Server, told: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import flow_engine

    (tmp_path / "spring.yaml").write_text(CAMPAIGN)
    document("submit", tmp_path / "spring.yaml", SDP_HOME=str(tmp_path / "home"))
    original = flow_engine.run_flow
    for state in ({"type": "COMPLETED", "data": {"a": 1}}, {"type": "CANCELLING"}):

        def forced_first(flow: Any, flow_run: Any, parameters: Any, state: Any = state) -> Any:
            server.ask(f"flow_runs/{flow_run.id}/set_state", force=True, state=state)
            return original(flow, flow_run=flow_run, parameters=parameters)

        monkeypatch.setattr(flow_engine, "run_flow", forced_first)
        with (
            open_services(Settings(home=tmp_path / "home")) as have,
            pytest.raises(RunForcedError, match="ended from outside with 2 jobs to do"),
        ):
            orchestration.run_campaign(have, "spring")


def test_a_flow_run_that_prefect_executes_reads_no_result(server: Server, tmp_path: Path) -> None:
    run = server.pending("gpu-worker")
    server.force(run, tmp_path / "trace")
    (empty := tmp_path / "empty").mkdir()  # Prefect copies the working folder, here the checkout with its .venv
    done = prefect("flow-run", "execute", run, cwd=empty, **server.told)
    assert "ForeignResultError" in done.stdout + done.stderr
    assert not (tmp_path / "trace").exists()
