"""A full deployment: a Prefect server, PostgreSQL, S3, and workers that share nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest
from sqlalchemy import select

from sdpipeline.db import queries
from sdpipeline.db.connection import Database, open_database
from sdpipeline.db.tables import attempt, job
from sdpipeline.db.tables import campaign as campaigns
from tests.integration.certificates import signing_settings
from tests.integration.commands import FAKE_ENGINE, document
from tests.integration.conftest import CREDENTIALS, Bucket, free_port, new_bucket

HEARTBEAT_S = 30
"""The shortest interval that Prefect allows."""
SILENCE_S = 40
LEASE_S = 4
BUSY = 503
"""The answer of a Prefect server whose SQLite database is locked; Prefect's own client retries."""
FAKE = {FAKE_ENGINE: "0.6", "SDP_ENGINE__MAX_BATCH": "4"}
PATIENCE_S = 150.0

_AWS = CREDENTIALS | {"AWS_CONFIG_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true"}

# A Prefect server on SQLite retries failed writes in its next loop, if another write was running. Loops are short here,
# and there are few other writes.
_SCHEDULER = {"MIN_RUNS": "1", "MAX_RUNS": "2", "LOOP_SECONDS": "5"}
_QUIET = {f"PREFECT_SERVER_SERVICES_SCHEDULER_{name}": value for name, value in _SCHEDULER.items()}
_QUIET |= {f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in ("FOREMAN", "LATE_RUNS", "REPOSSESSOR")}

T = TypeVar("T")


@dataclass
class Site:
    """A deployment: the environment of its commands and workers, and queries through Prefect's API and ours."""

    folder: Path
    environment: dict[str, str]
    bucket: Bucket
    port: int = field(default_factory=free_port)
    server: subprocess.Popen[bytes] | None = None
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @cached_property
    def database(self) -> Database:
        return open_database(self.environment["SDP_DATABASE_URL"])

    def command(self, *words: object, exit_code: int = 0) -> Any:
        """The JSON document of one of our commands."""
        return document(*words, exit_code=exit_code, given=self._told())

    def start_server(self) -> None:
        """Start a Prefect server; its database survives it."""
        words = ["server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        self.server = self._start("server", *words, **_QUIET)
        self.until(lambda: self._healthy(self.server))

    def start_worker(self, pool: str, name: str, **settings: str) -> subprocess.Popen[bytes]:
        """Start a `prefect worker` with a folder of its own, as on a separate machine."""
        limit = ["--limit", "1"] if pool == "gpu" else []
        return self._start(name, "worker", "start", "--pool", pool, "--name", name, *limit, **settings)

    def execute(self, run: str, **settings: str) -> subprocess.Popen[bytes]:
        """Start the command that a pod runs."""
        return self._start(f"pod-{run[:8]}", "flow-run", "execute", run, **settings)

    def output(self, name: str) -> str:
        return (self.folder / name / "output").read_text()

    def ask(self, what: str, **body: Any) -> Any:
        while (answer := httpx.post(f"{self.api_url}/{what}", json=body, timeout=30)).status_code == BUSY:
            time.sleep(0.2)
        return answer.raise_for_status().json()

    def look(self, what: str) -> Any:
        return httpx.get(f"{self.api_url}/{what}", timeout=30).raise_for_status().json()

    def run(self, deployment: str = "campaign/campaign", **run: Any) -> str:
        """Start a run of a deployment, as the UI does."""
        found = self.look(f"deployments/name/{deployment}")["id"]
        return str(self.ask(f"deployments/{found}/create_flow_run", **run)["id"])

    def state(self, run: str) -> str:
        return str(self.look(f"flow_runs/{run}")["state"]["name"])

    def workers(self, campaign: str) -> dict[str, Any]:
        """The gpu-worker runs of a campaign, by name."""
        every = self.ask("flow_runs/filter", flow_runs={"tags": {"all_": [f"fleet:default/{campaign}"]}})
        return {run["name"]: run for run in every}

    def campaign_runs(self, campaign: str) -> list[Any]:
        """The campaign flow's runs for this campaign, oldest first."""
        every = self.ask("flow_runs/filter", flow_runs={"tags": {"all_": [f"campaign:{campaign}"]}})
        ours = [run for run in every if f"fleet:default/{campaign}" not in run["tags"]]
        return sorted(ours, key=lambda run: str(run["created"]))

    def progress(self, campaign: str) -> Any:
        """The campaign's progress, or None before it was submitted."""
        with self.database.read() as connection:
            found = queries.campaign_id(connection, team="default", name=campaign)
            return None if found is None else queries.progress(connection, found)

    def succeeded(self, campaign: str) -> int:
        progress = self.progress(campaign)
        return progress.succeeded if progress is not None else 0

    def attempts(self, campaign: str, *, worker: str | None = None) -> list[Any]:
        """Every attempt at its jobs, or those of one worker."""
        of = select(job.c.id).join(campaigns, campaigns.c.id == job.c.campaign_id).where(campaigns.c.name == campaign)
        chosen = select(attempt).where(attempt.c.job_id.in_(of))
        with self.database.read() as connection:
            found = connection.execute(chosen).all()
        return [each for each in found if worker in {None, each.worker_id}]

    def at_work(self, campaign: str) -> list[Any]:
        """Live workers that have leased jobs of this campaign."""
        with self.database.read() as connection:
            living = queries.live_workers(connection)
        took = {each.worker_id for each in self.attempts(campaign)}
        return [worker for worker in living if worker["id"] in took]

    def until(self, ask: Callable[[], T]) -> T:
        """Poll until the answer is true, and return it."""
        ends_at = time.monotonic() + PATIENCE_S
        while not (answer := ask()):
            assert time.monotonic() < ends_at, self._everything()
            time.sleep(0.2)
        return answer

    def kill_everything(self) -> None:
        """Kill all processes that this deployment started, with their children."""
        for process in psutil.process_iter():
            try:
                if process.environ().get("SDP_TEST_SITE") == str(self.folder):
                    process.kill()
            except psutil.Error:
                continue
        for mine in self.started:
            mine.wait()

    def _told(self) -> dict[str, str]:
        return self.environment | {"PREFECT_API_URL": self.api_url, "SDP_TEST_SITE": str(self.folder)}

    def _start(self, name: str, *words: str, **settings: str) -> subprocess.Popen[bytes]:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        with (folder / "output").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect", *words],
                cwd=folder,
                env=os.environ | self._told() | {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO"} | settings,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def _healthy(self, server: subprocess.Popen[bytes] | None) -> bool:
        assert server is not None
        assert server.poll() is None, self.output("server")
        try:
            return httpx.get(f"{self.api_url}/health", timeout=5).is_success
        except httpx.HTTPError:
            return False

    def _everything(self) -> str:
        return "\n".join(f"== {log.parent.name}\n{log.read_text()[-3000:]}" for log in self.folder.glob("*/output"))


@contextmanager
def site(folder: Path, database_url: str, moto_url: str, seal_key: Path) -> Iterator[Site]:
    """A deployment with a migrated database and a running server."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in _AWS.items():
            environment.setenv(name, value)
        yield from _site(folder, database_url, new_bucket(moto_url), seal_key)


def _site(folder: Path, database_url: str, bucket: Bucket, seal_key: Path) -> Iterator[Site]:
    told = {
        "SDP_DATABASE_URL": database_url,
        "SDP_STORAGE_URL": f"s3://{bucket.name}/sdp",
        "SDP_S3__ENDPOINT_URL": bucket.endpoint_url,
        "SDP_S3__ADDRESSING_STYLE": "path",
        "SDP_SIGNING__SEAL_KEY_FILE": str(seal_key),
        "SDP_LEASE_TTL_S": str(LEASE_S),
        "SDP_LOG_LEVEL": "info",
        "SDP_INPUTS__ALLOWED": f'["s3://{bucket.name}/campaigns"]',
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
        "OMP_NUM_THREADS": "1",
    }
    here = Site(folder=folder, environment=told | signing_settings(folder), bucket=bucket)
    try:
        here.start_server()
        here.command("db", "upgrade")
        yield here
    finally:
        here.kill_everything()
        here.database.close()
