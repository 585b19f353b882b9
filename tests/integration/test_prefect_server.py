"""One local server per home: shared while it is used, gone when nobody uses it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sdpipeline import orchestration
from sdpipeline.errors import OrchestratorUnavailableError, SettingsError
from sdpipeline.prefect_server import Process, answers, own_server
from sdpipeline.settings import Settings

HOLDER = """
import pathlib, sys
from sdpipeline.prefect_server import own_server
with own_server(pathlib.Path(sys.argv[1])) as server:
    print(server.api_url, server.started, flush=True)
    sys.stdin.read()
"""


def test_two_commands_share_a_server_and_the_last_one_out_stops_it(tmp_path: Path) -> None:
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
        monkeypatch.setenv("PREFECT_API_URL", ours.api_url)
        with orchestration.local_server(Settings(home=tmp_path)) as server:
            assert (server.api_url, server.started) == (ours.api_url, False)
    assert list(tmp_path.iterdir()) == []


def test_the_demo_keeps_to_the_server_of_its_home(prefect_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with orchestration.local_server(Settings(home=prefect_home), always_own=True) as server:
        assert os.environ["PREFECT_API_URL"] == server.api_url
        assert answers(server.api_url)
    assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:9/api"


def test_a_server_of_ones_own_that_does_not_answer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    expected = pytest.raises(SettingsError, match=r"PREFECT_API_URL.*does not answer")
    with expected, orchestration.local_server(Settings(home=tmp_path)):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(15)  # the promise of the error message
def test_a_server_that_takes_calls_and_says_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/api")
        expected = pytest.raises(SettingsError, match="check the address and that the server runs")
        with expected, orchestration.local_server(Settings(home=tmp_path)):
            pass
