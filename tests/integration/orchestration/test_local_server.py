"""One local Prefect server per home: shared while it is in use, stopped when its last user ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import psutil
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from sdpipeline import orchestration
from sdpipeline.app import services
from sdpipeline.errors import OrchestratorUnavailableError, SettingsError
from sdpipeline.flows.maintenance import seal
from sdpipeline.orchestration.local_server import Process, ServerHandle, answers, own_server, wait_until_unused
from sdpipeline.settings import Settings
from tests.conftest import copied_into
from tests.integration.commands import credentials

HOLDER = """
import pathlib, sys
from sdpipeline.orchestration.local_server import own_server
with own_server(pathlib.Path(sys.argv[1])) as server:
    print(server.api_url, server.started, flush=True)
    sys.stdin.read()
"""


@pytest.mark.long
def test_two_commands_share_a_server_and_the_last_one_out_stops_it(tmp_path: Path, prefect_database: Path) -> None:
    copied_into(tmp_path / "prefect", prefect_database)
    with own_server(tmp_path) as server:
        other = subprocess.Popen(
            [sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert other.stdout is not None
        assert other.stdout.readline().split() == [server.api_url, "False"]
    assert answers(server.api_url)  # the other command still uses it
    other.communicate("")
    assert not answers(server.api_url)
    assert list((tmp_path / "prefect").glob("server.json")) == []


def test_a_server_that_was_asked_to_stay_is_found_again(prefect_home: Path) -> None:
    with own_server(prefect_home) as first, own_server(prefect_home) as second:
        assert not first.started
    assert (first.api_url, first.pid) == (second.api_url, second.pid)
    assert answers(first.api_url)


def test_a_recorded_process_that_does_not_answer_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = subprocess.Popen(["sleep", "60"], start_new_session=True)
    process = Process.of(stuck.pid)
    record = {"url": "http://127.0.0.1:9", "server": asdict(process), "users": [], "keep": False}
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect" / "server.json").write_text(json.dumps(record))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OrchestratorUnavailableError), own_server(tmp_path):
        pass
    assert not process.alive()
    stuck.wait()


def test_a_server_that_cannot_start_shows_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'file is not a database' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(OrchestratorUnavailableError, match="file is not a database"), own_server(tmp_path):
        pass


def test_a_reused_pid_is_no_living_process() -> None:
    me = Process.of(os.getpid())
    assert me.alive()
    assert not replace(me, started_at=me.started_at - 1).alive()


def test_a_server_of_ones_own_is_used_and_nothing_is_started(
    prefect_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with own_server(prefect_home) as ours:
        for name, value in ours.environment.items():
            monkeypatch.setenv(name, value)
        with orchestration.prefect_server(Settings(home=tmp_path)) as server:
            assert (server.api_url, server.started) == (ours.api_url, False)
    assert list(tmp_path.iterdir()) == []


def test_the_demo_keeps_to_the_server_of_its_home(prefect_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with orchestration.prefect_server(Settings(home=prefect_home), always_own=True) as server:
        assert os.environ["PREFECT_API_URL"] == server.api_url
        assert answers(server.api_url)
    assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:9/api"


def test_a_server_of_ones_own_that_does_not_answer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    expected = pytest.raises(SettingsError, match=r"PREFECT_API_URL.*does not answer")
    with expected, orchestration.prefect_server(Settings(home=tmp_path)):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(15)  # as the error message promises
def test_a_server_that_takes_calls_and_says_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/api")
        expected = pytest.raises(SettingsError, match="check the address and that the server runs")
        with expected, orchestration.prefect_server(Settings(home=tmp_path)):
            pass


@pytest.fixture(scope="module")
def server(prefect_home: Path) -> Iterator[ServerHandle]:
    with own_server(prefect_home) as handle:
        yield handle


def test_runs_of_a_schedule_are_planned(prefect_home: Path, server: ServerHandle) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas import actions, filters, schedules

    hourly = actions.DeploymentScheduleCreate(schedule=schedules.CronSchedule(cron="0 * * * *"), active=True)
    with (
        orchestration.prefect_server(services.load_settings(prefect_home), always_own=True),
        get_client(sync_client=True) as client,
    ):
        deployment = client.create_deployment(client.create_flow(seal), "planned", schedules=[hourly])
        chosen = filters.DeploymentFilter(id=filters.DeploymentFilterId(any_=[deployment]))
        try:
            ends_at = time.monotonic() + 60
            while not (runs := client.read_flow_runs(deployment_filter=chosen)):
                assert time.monotonic() < ends_at, "no run was planned"
                time.sleep(0.2)
        finally:
            client.delete_deployment(deployment)
    first = min(run.expected_start_time for run in runs if run.expected_start_time is not None)
    assert datetime.now(UTC) + timedelta(hours=1) >= first


def test_only_who_has_the_homes_password_is_answered(server: ServerHandle) -> None:
    ask = partial(httpx.post, f"{server.api_url}/flows/filter", json={})
    assert ask().status_code == 401
    assert ask(auth=httpx.BasicAuth("sdpipeline", "guess")).status_code == 401
    assert ask(auth=credentials(server)).status_code == 200


def test_nobody_else_can_read_the_password(server: ServerHandle, prefect_home: Path) -> None:
    file, folder = server.password_file, prefect_home / "prefect"
    assert file is not None
    assert file.read_text().strip() == server.password
    assert (stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(folder.stat().st_mode)) == (0o600, 0o700)
    secret = str(server.password).partition(":")[2]
    assert len(secret) > 40
    assert secret not in str(psutil.Process(server.pid).cmdline())
    assert secret not in (prefect_home / "logs" / "prefect-server.log").read_text()
    assert secret not in repr(server)


@pytest.mark.parametrize(
    ("header", "value", "answer"),
    [
        ("Host", "attacker.example", 400),
        ("Host", "127.0.0.1.attacker.example", 400),
        ("Host", "localhost", 200),
        ("Origin", "http://attacker.example", 403),
        ("Origin", "http://127.0.0.1:1", 403),
        ("Origin", "null", 403),
        ("Origin", "OWN", 200),
    ],
)
def test_pages_of_other_hosts_and_origins_are_refused(
    server: ServerHandle, header: str, value: str, answer: int
) -> None:
    headers = {header: server.ui_url if value == "OWN" else value}
    for path in ("/api/health", "/"):
        assert httpx.get(server.ui_url + path, headers=headers).status_code == answer
    shared = httpx.get(f"{server.api_url}/health", headers=headers).headers.get("access-control-allow-origin")
    assert shared == (server.ui_url if value == "OWN" else None)


@pytest.mark.parametrize("headers", [{"Host": "attacker.example"}, {"Origin": "http://attacker.example"}])
@pytest.mark.parametrize("path", ["events/out", "logs/out"])
def test_websockets_of_other_hosts_and_origins_are_refused(
    server: ServerHandle, path: str, headers: dict[str, str]
) -> None:
    url = f"{server.api_url.replace('http', 'ws', 1)}/{path}"
    with pytest.raises(InvalidStatus, match=r"HTTP 40[03]"):
        connect(url, additional_headers=headers, subprotocols=[Subprotocol("prefect")], proxy=None)


@pytest.mark.parametrize("path", ["events/out", "logs/out"])
def test_a_websocket_wants_the_password(server: ServerHandle, path: str) -> None:
    url = f"{server.api_url.replace('http', 'ws', 1)}/{path}"
    with connect(url, subprotocols=[Subprotocol("prefect")], proxy=None) as socket_:
        socket_.send(json.dumps({"type": "auth", "token": "guess"}))
        with pytest.raises(ConnectionClosed):
            socket_.recv(timeout=30)


def test_a_port_that_another_process_took_is_sent_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded process is alive, but another process listens on its port."""
    alive = subprocess.Popen(["sleep", "600"], start_new_session=True)
    folder = tmp_path / "prefect"
    folder.mkdir(mode=0o700)
    asked: list[bytes] = []

    class Impostor(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(bytes(self.headers))
            self.send_response(200)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Impostor) as impostor:
        threading.Thread(target=impostor.serve_forever, daemon=True).start()
        url, process = f"http://127.0.0.1:{impostor.server_port}", asdict(Process.of(alive.pid))
        record = {"url": url, "server": process, "users": [], "keep": True, "locked": True}
        (folder / "server.json").write_text(json.dumps(record))
        (folder / "password").touch(mode=0o600)
        (folder / "password").write_text("sdpipeline:secret")
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(OrchestratorUnavailableError), own_server(tmp_path):
            pass
        impostor.shutdown()
    alive.wait()
    assert asked == []
    assert (folder / "password").read_text() != "sdpipeline:secret"


def test_a_server_without_a_password_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run --keep-ui` of an earlier release left such servers."""
    older = subprocess.Popen(["sleep", "600"], start_new_session=True)
    process = Process.of(older.pid)
    record = {"url": "http://127.0.0.1:9", "server": asdict(process), "users": [], "keep": True}
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect" / "server.json").write_text(json.dumps(record))
    monkeypatch.setattr("sdpipeline.orchestration.local_server._Record.owns_its_port", lambda _: True)
    monkeypatch.setattr("sdpipeline.orchestration.local_server._settles", lambda _: True)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OrchestratorUnavailableError), own_server(tmp_path):
        pass
    assert not process.alive()
    older.wait()


def test_the_server_of_a_command_that_was_killed_while_it_started_is_ended_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = tmp_path / "stuck"
    stuck.write_text("#!/bin/sh\nexec sleep 600\n")
    stuck.chmod(0o755)
    command = [sys.executable, "-c", f"import sys; sys.executable = {str(stuck)!r}\n{HOLDER}", str(tmp_path)]
    starting, record = subprocess.Popen(command), tmp_path / "prefect" / "server.json"
    ends_at = time.monotonic() + 60
    while not record.exists():
        assert time.monotonic() < ends_at
        time.sleep(0.05)
    server = Process(**json.loads(record.read_text())["server"])
    starting.kill()
    starting.wait()
    assert server.alive()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OrchestratorUnavailableError), own_server(tmp_path):
        pass
    assert (server.alive(), record.exists()) == (False, False)


def test_a_server_that_ends_leaves_the_record_of_another(tmp_path: Path) -> None:
    me, record = Process.of(os.getpid()), tmp_path / "server.json"
    gone = asdict(replace(me, started_at=0.0))
    record.write_text(json.dumps({"url": "http://127.0.0.1:9", "server": gone, "users": [], "keep": True}))
    wait_until_unused(tmp_path, me, Process(**gone)).release()
    assert json.loads(record.read_text())["server"] == gone


def test_a_worker_imports_nothing_from_the_current_folder(
    server: ServerHandle, prefect_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = planted(tmp_path, "multiprocessing")
    monkeypatch.chdir(tmp_path)
    with orchestration.prefect_server(Settings(home=prefect_home)):
        worker = multiprocessing.get_context("spawn").Process(target=os.getpid)
        worker.start()
        worker.join()
    assert (worker.exitcode, trace.exists()) == (0, False)


def planted(folder: Path, module: str) -> Path:
    """A module planted by another user; return the file that it writes when it is imported."""
    trace = folder / "trace"
    (folder / f"{module}.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    return trace


@pytest.mark.long
def test_a_server_whose_only_command_was_killed_ends(tmp_path: Path, prefect_database: Path) -> None:
    """Also for a user without a home, behind a proxy that cannot be reached, in a folder that others can write to."""
    trace = planted(tmp_path, "uvicorn")
    copied_into(tmp_path / "prefect", prefect_database)
    nowhere = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    bare = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"} | nowhere
    bare.pop("HOME", None)
    holder = subprocess.Popen(
        ["unshare", "--user", "--map-user=4242", sys.executable, "-c", HOLDER, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=bare | {"NO_PROXY": ""},
        cwd=tmp_path,
    )
    assert holder.stdout is not None
    url = holder.stdout.readline().split()[0]
    recorded = json.loads((tmp_path / "prefect" / "server.json").read_text())["server"]
    found = psutil.Process(recorded["pid"])
    assert answers(url)
    holder.kill()
    holder.communicate()
    found.wait(60)
    assert not (tmp_path / "prefect" / "server.json").exists()
    assert not trace.exists()
