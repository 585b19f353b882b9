"""Workers behind the Prefect gateway: requests that they need pass, and requests that would give them control are
refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from sdpipeline.orchestration.gateway_rules import DISPATCHER, WORKER
from tests.conftest import copied_into
from tests.integration.commands import FAKE_ENGINE, document
from tests.integration.conftest import free_port, served
from tests.integration.deployed import BUSY
from tests.integration.gateway_requests import STATE, TWINS, Asked

if TYPE_CHECKING:
    from websockets.sync.connection import Connection

pytestmark = pytest.mark.timeout(300)

AUTH = {"server": "admin:the-password", WORKER.name: "gpu:its-own", DISPATCHER.name: "cpu:its-own"}
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
CAMPAIGN = """\
name: {name}
checkpoint: shapes
seeds: {{start: 0, count: {jobs}}}
defaults: {{width: 64, height: 64, num_inference_steps: 1, guidance_scale: 1.0}}
stages:
  - {{id: draft, task: text-to-image, prompt: a red circle}}
"""


@dataclass(frozen=True)
class Site:
    """A Prefect server behind its password, the gateway in front of it, and a home that workers share."""

    folder: Path
    server: str
    gateway: str

    def environment(self, role: str, url: str) -> dict[str, str]:
        own = {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": AUTH[role], "PREFECT_HOME": str(self.folder / role)}
        home = {"SDP_HOME": str(self.folder / "home"), FAKE_ENGINE: "0.1"}
        return os.environ | own | home | {"PREFECT_WORKER_QUERY_SECONDS": "1"}

    def as_(self, role: str) -> httpx.Client:
        """A client of the API with the credentials of this role; only the role `server` bypasses the gateway."""
        url = self.server if role == "server" else self.gateway
        user, _, password = AUTH[role].partition(":")
        # A kept connection may be closed by the server at the moment of the next request.
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.Client(base_url=url, auth=(user, password), timeout=30, limits=limits)

    def run(self, deployment: str, **run: Any) -> str:
        with self.as_("server") as api:
            found = self.until(lambda: api.get(f"deployments/name/{deployment}"))["id"]
            return str(self.until(lambda: api.post(f"deployments/{found}/create_flow_run", json=run))["id"])

    def until(self, ask: Callable[[], httpx.Response], accept: Callable[[Any], bool] = lambda _: True) -> Any:
        """Poll until an answer is accepted and none is an error; a Prefect server on SQLite may be busy."""
        ends_at = time.monotonic() + 120
        while True:
            answer = ask()
            assert answer.is_success or answer.status_code == BUSY, answer.text
            found = answer.json() if answer.is_success and answer.content else None
            if answer.is_success and accept(found):
                return found
            assert time.monotonic() < ends_at, f"{answer.text}\n{self.logs()}"
            time.sleep(0.3)

    def logs(self) -> str:
        return "\n".join(f"== {log}\n{log.read_text()[-4000:]}" for log in self.folder.glob("*/server.log"))


@contextmanager
def worker(site: Site, role: str, pool: str) -> Iterator[None]:
    """A `prefect worker` that knows the gateway, but neither the server nor its password."""
    words = ["worker", "start", "--pool", pool, "--type", "process", "--name", f"{pool}-worker"]
    folder, environment = site.folder / f"{pool}-worker", site.environment(role, site.gateway.rstrip("/"))
    folder.mkdir()
    with (folder / "server.log").open("wb") as log:
        command = [sys.executable, "-m", "prefect", *words]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, prefect_database: Path) -> Iterator[Site]:
    """All deployments on a server with a password, and the gateway in front of it."""
    folder = tmp_path_factory.mktemp("gateway")
    server, gateway = free_port(), free_port()
    here = Site(folder, f"http://127.0.0.1:{server}/api/", f"http://127.0.0.1:{gateway}/api/")
    own = here.environment("server", here.server.rstrip("/"))
    roles = {f"SDP_GATEWAY__{role.name.upper()}_AUTH": AUTH[role.name] for role in (WORKER, DISPATCHER)}
    prefect = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(server)]
    with ExitStack() as running:

        def start(name: str, port: int, environment: Mapping[str, str], *words: str) -> None:
            (folder / name).mkdir(exist_ok=True)
            command = [sys.executable, "-m", *words]
            running.enter_context(served(command, port, folder / name, environment=environment))

        copied_into(folder / "server", prefect_database)
        start("server", server, own | {"PREFECT_SERVER_API_AUTH_STRING": AUTH["server"]}, *prefect)
        start("gateway", gateway, own | roles, "sdpipeline", "prefect-gateway", "--port", str(gateway))
        here.until(lambda: httpx.get(f"{here.gateway}health"), lambda _: True)
        document("deploy", given=own)
        for name, jobs in (("spring", 8), ("summer", 4000)):
            (folder / f"{name}.yaml").write_text(CAMPAIGN.format(name=name, jobs=jobs))
            document("submit", folder / f"{name}.yaml", given=own)
        yield here


@pytest.fixture(scope="module")
def worked(site: Site) -> Iterator[str]:
    """The run of a campaign that both workers finished through the gateway; the workers keep running."""
    with worker(site, DISPATCHER.name, "cpu"), worker(site, WORKER.name, "gpu"), site.as_("server") as api:
        run = site.run("campaign/campaign", parameters={"request": {"campaign": "spring"}})
        ended = site.until(lambda: api.get(f"flow_runs/{run}"), lambda found: found["state_type"] in ENDED)
        assert ended["state_type"] == "COMPLETED", site.logs()
        yield run


@pytest.fixture(scope="module")
def ids(worked: str, site: Site) -> dict[str, str]:
    """The ids for the placeholders in the requests; no worker starts these runs."""
    pending = {"state": {"type": "PENDING"}}
    found = {"GPU": site.run("gpu-worker/gpu-worker", **pending), "CPU": site.run("reclaim/reclaim", **pending)}
    with site.as_("server") as api:
        ours = site.until(lambda: api.get("deployments/name/gpu-worker/gpu-worker"))
        other = site.until(lambda: api.get("deployments/name/retention/retention"))
    return found | {"DEPLOYED": ours["id"], "FLOW": ours["flow_id"], "NIGHTLY": other["id"]}


def test_a_campaign_goes_through_to_its_end_with_its_logs_task_runs_and_artifacts(worked: str, site: Site) -> None:
    with site.as_("server") as api:
        children = site.until(lambda: api.post("flow_runs/filter", json={"flows": {"name": {"any_": ["gpu-worker"]}}}))
        assert {each["state_type"] for each in children} == {"COMPLETED"}
        of_child = {"flow_runs": {"id": {"any_": [children[0]["id"]]}}}
        tasks = site.until(lambda: api.post("task_runs/filter", json=of_child))
        assert {each["state_name"] for each in tasks} == {"Completed"}
        lines = {"logs": {"flow_run_id": {"any_": [children[0]["id"]]}}}
        site.until(
            lambda: api.post("logs/filter", json=lines),
            lambda found: any("Finished" in each["message"] for each in found),
        )
        keys = {each["key"] for each in site.until(lambda: api.post("artifacts/filter", json={}))}
    assert {"report-spring", "contact-sheet-spring"} <= keys


def test_nothing_that_the_workers_asked_for_was_refused(worked: str, site: Site) -> None:
    log = (site.folder / "gateway" / "server.log").read_text()
    assert [line for line in log.splitlines() if "gateway_refused" in line and "workers/connect" not in line] == []


def test_a_run_that_is_cancelled_ends_within_a_batch(worked: str, site: Site) -> None:
    run = site.run("gpu-worker/gpu-worker", parameters={"campaign": "summer"})
    with site.as_(DISPATCHER.name) as api:
        site.until(lambda: api.get(f"flow_runs/{run}"), lambda found: found["state_type"] == "RUNNING")
        cancelling = {"state": {"type": "CANCELLING", "name": "Cancelling", "data": None}}
        site.until(lambda: api.post(f"flow_runs/{run}/set_state", json=cancelling))
        site.until(lambda: api.get(f"flow_runs/{run}"), lambda found: found["state_type"] == "CANCELLED")


def test_the_credentials_open_their_own_door_only(ids: dict[str, str], site: Site) -> None:
    for role, url, status in (
        (WORKER.name, site.server, 401),
        (DISPATCHER.name, site.server, 401),
        ("server", site.gateway, 401),
        (WORKER.name, site.gateway, 200),
    ):
        user, _, password = AUTH[role].partition(":")
        assert httpx.get(f"{url}flow_runs/{ids['GPU']}", auth=(user, password)).status_code == status
    assert httpx.get(f"{site.gateway}flow_runs/{ids['GPU']}").status_code == 401


@pytest.mark.parametrize(
    ("role", "refused", "allowed"), [pytest.param(role, *twin, id=f"{role}: {may}") for role, may, *twin in TWINS]
)
def test_what_would_make_a_worker_master_is_refused_and_its_own_work_is_not(
    role: str, refused: Asked, allowed: Asked, ids: dict[str, str], site: Site
) -> None:
    with site.as_(role) as api:
        asked = refused.about(ids)
        answer = api.request(asked.method, asked.path, json=asked.body)
        assert (answer.status_code, list(answer.json())) == (403, ["detail"]), answer.text
        asked = allowed.about(ids)
        site.until(lambda: api.request(asked.method, asked.path, json=asked.body))


def test_a_search_finds_runs_of_the_own_pools_only(ids: dict[str, str], site: Site) -> None:
    everything = {"work_pools": {"name": {"any_": ["cpu", "gpu"]}}}
    for role, seen in ((WORKER.name, {"GPU"}), (DISPATCHER.name, {"GPU", "CPU"})):
        with site.as_(role) as api:
            found = {each["id"] for each in site.until(lambda api=api: api.post("flow_runs/filter", json=everything))}  # type: ignore[misc]
        assert {short for short in ("GPU", "CPU") if ids[short] in found} == seen


def test_only_events_about_own_runs_reach_the_server(ids: dict[str, str], site: Site) -> None:
    forged, own = _heartbeat(ids["CPU"]), _heartbeat(ids["GPU"])
    stolen = _task_event(ids["CPU"]), _task_event(ids["GPU"], payload={"flow_run_id": ids["CPU"]})
    foreign = _event("prefect.work-pool.not-ready", "prefect.work-pool.gpu")
    with _socket(site, "in", AUTH[WORKER.name]) as socket:
        for event in (forged, *stolen, foreign, own):
            socket.send(json.dumps(event))
        lately = {"since": (datetime.now(UTC) - timedelta(hours=1)).isoformat()}
        since: dict[str, Any] = {"filter": {"occurred": lately, "id": {"id": [own["id"]]}}, "limit": 50}
        with site.as_("server") as api:
            site.until(lambda: api.post("events/filter", json=since), lambda found: found["total"] == 1)
            since["filter"]["id"]["id"] = [each["id"] for each in (forged, *stolen, foreign)]
            assert site.until(lambda: api.post("events/filter", json=since))["events"] == []


def test_a_worker_sees_events_of_its_own_runs_only(ids: dict[str, str], site: Site) -> None:
    def seen(socket: Connection, api: httpx.Client) -> Any:
        """The first event. A subscription misses events while it begins, so the state changes are repeated."""
        for turn in range(30):
            for short in ("CPU", "GPU"):
                moved = {"state": STATE | {"name": f"Seen {turn}"}, "force": True}
                site.until(lambda short=short, moved=moved: api.post(f"flow_runs/{ids[short]}/set_state", json=moved))  # type: ignore[misc]
            with suppress(TimeoutError):
                return json.loads(socket.recv(timeout=2))["event"]
        raise AssertionError(site.logs())

    with _socket(site, "out", AUTH[WORKER.name]) as socket, site.as_("server") as api:
        # The default is now, which excludes later events.
        until = {"until": (datetime.now(UTC) + timedelta(hours=1)).isoformat()}
        wanted = {"occurred": until, "event": {"prefix": ["prefect.flow-run.Seen"]}}
        socket.send(json.dumps({"type": "filter", "filter": wanted}))
        assert seen(socket, api)["resource"]["prefect.resource.id"] == f"prefect.flow-run.{ids['GPU']}"


def test_a_socket_asks_for_a_credential_and_the_channel_of_workers_is_closed(site: Site) -> None:
    for auth in ("gpu:another", AUTH["server"]):
        with pytest.raises(AssertionError, match="Invalid token"), _socket(site, "in", auth):
            pass
    with pytest.raises(InvalidStatus, match="403"):
        connect(f"{site.gateway.replace('http', 'ws')}work_pools/gpu/workers/connect", subprotocols=["prefect"])  # type: ignore[list-item]


@contextmanager
def _socket(site: Site, way: str, auth: str) -> Iterator[Connection]:
    """A websocket, connected and authenticated as by Prefect's clients."""
    with connect(f"{site.gateway.replace('http', 'ws')}events/{way}", subprotocols=["prefect"]) as socket:  # type: ignore[list-item]
        socket.send(json.dumps({"type": "auth", "token": auth}))
        try:
            assert json.loads(socket.recv(timeout=30)) == {"type": "auth_success"}
        except ConnectionClosed as closed:
            raise AssertionError(str(closed)) from closed
        yield socket


def _event(name: str, resource: str, **more: Any) -> dict[str, Any]:
    at = datetime.now(UTC).isoformat()
    about = {"prefect.resource.id": resource}
    return {"id": str(uuid4()), "event": name, "occurred": at, "resource": about, "related": [], "payload": {}} | more


def _heartbeat(run: str) -> dict[str, Any]:
    return _event("prefect.flow-run.heartbeat", f"prefect.flow-run.{run}")


def _task_event(run: str, payload: Mapping[str, Any] | None = None) -> dict[str, Any]:
    of_run = [{"prefect.resource.id": f"prefect.flow-run.{run}", "prefect.resource.role": "flow-run"}]
    told = {
        "task_run": {"name": "x", "task_key": "x", "dynamic_key": "x"} | dict(payload or {}),
        "validated_state": STATE,
    }
    return _event("prefect.task-run.Pending", f"prefect.task-run.{uuid4()}", related=of_run, payload=told)
