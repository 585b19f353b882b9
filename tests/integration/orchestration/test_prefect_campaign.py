"""A campaign under a real Prefect server: its display in the UI, a worker that dies, and a user who interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from sdpipeline import cli
from sdpipeline.app import services
from sdpipeline.app.queries import campaign_progress
from sdpipeline.db import queries
from sdpipeline.orchestration.local_server import ServerHandle, own_server
from tests.integration.commands import credentials

pytestmark = pytest.mark.timeout(300)  # a server and a handful of processes, on a machine that may be busy

JOBS = 64
CAMPAIGN = f"""\
name: spring-catalogue
checkpoint: shapes
seeds: {{start: 0, count: {JOBS}}}
defaults: {{width: 64, height: 64, num_inference_steps: 1, guidance_scale: 1.0}}
stages:
  - id: draft
    task: text-to-image
    prompt: a red circle
"""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A command that runs a campaign in a home of its own, and the Prefect server that displays it."""

    home: Path
    server: ServerHandle
    process: subprocess.Popen[bytes]

    def progress(self) -> queries.Progress:
        with services.open_services(services.load_settings(self.home)) as have:
            return campaign_progress(have, "spring-catalogue")

    def until(self, ask: Callable[[], T]) -> T:
        """Poll until the answer is true while the command runs; the suite's time-out bounds the wait."""
        while not (answer := ask()):
            assert self.process.poll() is None, (self.home / "output").read_text()
            time.sleep(0.3)
        return answer

    def succeeded(self) -> int:
        return self.progress().succeeded if self._submitted() else 0

    def workers(self) -> list[Any]:
        """Live workers that hold a lease."""
        if not self._submitted():
            return []
        with services.open_services(services.load_settings(self.home)) as have, have.database.read() as connection:
            return [worker for worker in queries.live_workers(connection) if worker["leases"]]

    def _submitted(self) -> bool:
        with services.open_services(services.load_settings(self.home)) as have, have.database.read() as connection:
            return bool(queries.campaign_names(connection, team="default"))

    def ask(self, what: str) -> Any:
        url, known = f"{self.server.api_url}/{what}/filter", credentials(self.server)
        return httpx.post(url, json={}, auth=known, timeout=30).raise_for_status().json()

    def runs(self) -> list[Any]:
        """The flow runs of this command: tests share a server, but not a home."""
        every = self.ask("flow_runs")
        return [run for run in every if str(self.home) in str(run["parameters"])]

    def artifacts(self) -> dict[str, Any]:
        ours = {run["id"] for run in self.runs()}
        every = self.ask("artifacts")
        return {artifact["type"]: artifact for artifact in every if artifact["flow_run_id"] in ours}

    def tasks(self) -> list[Any]:
        ours = {run["id"] for run in self.runs()}
        every = self.ask("task_runs")
        return [task for task in every if task["flow_run_id"] in ours]


Launch = Callable[[Path, int], Running]


@pytest.fixture(scope="module")
def launch(prefect_home: Path) -> Iterator[Launch]:
    """A function that starts a command with this many workers of the fake engine."""
    started: list[Running] = []

    def start(home: Path, workers: int) -> Running:
        campaign = home / "campaign.yaml"
        campaign.write_text(CAMPAIGN)
        variables = {**server.environment, "SDP_WORKERS": str(workers)}
        fake = {"SDP_ENGINE__FAKE_SECONDS_PER_BATCH": "0.5", "SDP_ENGINE__MAX_BATCH": "4"}
        with (home / "output").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "sdpipeline", "run", campaign, "--home", home],
                env=os.environ | variables | fake,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A suite that a shell started in the background ignores Ctrl-C, and so would its child processes.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            )
        started.append(Running(home=home, server=server, process=process))
        return started[-1]

    with own_server(prefect_home) as server:
        yield start
        for running in started:
            if running.process.poll() is None:
                os.killpg(running.process.pid, signal.SIGKILL)
                running.process.wait()


@pytest.fixture(scope="module")
def survivor(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> tuple[Running, int, set[float]]:
    """A finished run in which one worker was killed, that worker's pid, and every progress value that the UI showed."""
    running = launch(tmp_path_factory.mktemp("survivor"), 2)
    victim = running.until(lambda: running.workers() if running.succeeded() else [])[-1]["pid"]
    os.kill(victim, signal.SIGKILL)
    shown = set()
    while running.process.poll() is None:
        shown |= {artifact["data"] for kind, artifact in running.artifacts().items() if kind == "progress"}
        time.sleep(0.3)
    assert running.process.returncode == 0, (running.home / "output").read_text()
    shown.add(running.artifacts()["progress"]["data"])
    return running, victim, shown


def test_the_run_has_a_readable_name_and_tags(survivor: tuple[Running, int, set[float]]) -> None:
    (parent,) = [run for run in survivor[0].runs() if run["parent_task_run_id"] is None]
    assert parent["name"] == f"spring-catalogue · v1 · {JOBS} jobs"
    assert set(parent["tags"]) == {"campaign:spring-catalogue", "checkpoint:shapes", "team:default"}
    assert (parent["state"]["type"], parent["state"]["message"]) == (
        "COMPLETED",
        f"spring-catalogue: {JOBS} of {JOBS} succeeded",
    )


def test_progress_moves_on_its_way_to_the_end(survivor: tuple[Running, int, set[float]]) -> None:
    shown = survivor[2]
    assert 100 in shown
    assert any(0 < percentage < 100 for percentage in shown)


def test_the_newest_pictures_and_the_report_stay_with_the_run(survivor: tuple[Running, int, set[float]]) -> None:
    artifacts = survivor[0].artifacts()
    assert artifacts["image"]["data"].startswith("data:image/jpeg;base64,")
    assert len(artifacts["image"]["data"]) < 4 / 3 * 200_000 + 100
    assert "spring-catalogue" in artifacts["markdown"]["data"]
    assert "table" not in artifacts  # no job failed


def test_a_killed_worker_shows_as_crashed_and_is_replaced(survivor: tuple[Running, int, set[float]]) -> None:
    running, victim, _ = survivor
    children = {run["name"]: run["state"] for run in running.runs() if run["parent_task_run_id"] is not None}
    assert Counter(state["type"] for state in children.values()) == {"COMPLETED": 2, "CRASHED": 1}
    (crashed,) = [state for state in children.values() if state["type"] == "CRASHED"]
    assert f"(process {victim}) ended by signal 9" in crashed["message"]
    assert [name for name in children if name.endswith("· restart 1")]
    assert {task["state_type"] for task in running.tasks()} == {"COMPLETED", "CRASHED"}


def test_a_killed_workers_jobs_are_made_once_by_the_others(survivor: tuple[Running, int, set[float]]) -> None:
    progress = survivor[0].progress()
    assert (progress.succeeded, progress.total, progress.images) == (JOBS, JOBS, JOBS)


@pytest.mark.parametrize(
    ("stop", "exit_code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)]
)
def test_an_interrupted_run_gives_its_leases_back(
    launch: Launch, tmp_path: Path, stop: signal.Signals, exit_code: int
) -> None:
    running = launch(tmp_path, 1)
    running.until(running.workers)
    os.killpg(running.process.pid, stop) if stop is signal.SIGINT else running.process.send_signal(stop)
    assert running.process.wait(60) == exit_code
    assert running.workers() == []
    progress = running.progress()
    assert (progress.leased, progress.ready + progress.succeeded) == (0, JOBS)
    assert {run["state"]["type"] for run in running.runs()} == {"CANCELLED"}


@pytest.mark.long
def test_a_cancelled_campaign_ends_as_cancelled(launch: Launch, tmp_path: Path) -> None:
    running = launch(tmp_path, 1)
    running.until(running.workers)
    assert cli.run(["cancel", "spring-catalogue", "--home", str(tmp_path)]) == 0  # in this process: 64 jobs take 8 s
    assert running.process.wait(120) == 0, (tmp_path / "output").read_text()
    (state,) = [run["state"] for run in running.runs() if run["parent_task_run_id"] is None]
    done = running.progress()
    assert (state["type"], state["message"]) == (
        "CANCELLED",
        f"spring-catalogue: {done.succeeded} of {done.succeeded} succeeded, {done.cancelled} cancelled",
    )
