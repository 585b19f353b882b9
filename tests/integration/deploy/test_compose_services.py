"""Every service of deploy/compose.yaml as a plain process with its own command and settings, and a campaign on them.

It replaces a container engine: host names become local ports, and mounted files are replaced by their paths here. The
S3 server is another one, because the image's has no Python package. The engine is the fake one, because there is no
GPU. Prefect's database is SQLite, because the PostgreSQL of the wheel lacks pg_trgm; SDP_TEST_PREFECT_DATABASE_URL
names another.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from sdpipeline.audit import load_key
from tests.chaos.postgres import postgres_server
from tests.conftest import copied_into
from tests.integration.certificates import signing_settings
from tests.integration.commands import FAKE_ENGINE
from tests.integration.compose_file import DEPLOY, composed, services, variables
from tests.integration.conftest import free_port, served

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

ONCE = ("bucket", "migrate", "roles", "deploy")
STARTED = ("prefect-server", "prefect-gateway", "sealer", "cpu-worker", "gpu-worker")
ELSEWHERE = {"postgres": "a server out of a wheel", "seaweedfs": "moto", "s3": "one test's, where there is HAProxy"}
CAMPAIGN = """\
name: composed
checkpoint: shapes
seeds: {start: 0, count: 4}
defaults: {width: 64, height: 64, num_inference_steps: 2, guidance_scale: 1.0}
stages:
  - {id: draft, task: text-to-image, prompt: a red circle}
"""


@dataclass(slots=True)
class Stack:
    """The services that run, and their addresses and paths on this machine."""

    folder: Path
    bin_path: Path
    places: Mapping[str, str]
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def here(self, text: str) -> str:
        for there, here in self.places.items():
            text = text.replace(there, here)
        return text

    def environment(self, name: str, **more: str) -> dict[str, str]:
        own = {key: self.here(value) for key, value in services()[name]["environment"].items()}
        homes = {"HOME": str(self.folder), "SDP_HOME": str(self.folder / name), "PREFECT_HOME": str(self.folder / name)}
        kept = {key: os.environ[key] for key in ("PATH", "OMP_NUM_THREADS", "LANG") if key in os.environ}
        return kept | homes | own | more

    def command(self, words: Sequence[str]) -> list[str]:
        programs = {
            "python": [sys.executable],
            "psql": [str(self.bin_path / "psql")],
            "sdpipeline": [sys.executable, "-m", "sdpipeline"],
            "prefect": [sys.executable, "-m", "prefect"],
        }
        return [*programs[words[0]], *(self.here(word) for word in words[1:])]

    def once(self, name: str, *words: object, **more: str) -> str:
        """Run a service that exits by itself, or another command with its settings."""
        command = self.command([*map(str, words)] or services()[name]["command"])
        environment = self.environment(name, **more)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def start(self, name: str, **more: str) -> None:
        """Start a service that keeps running."""
        with (self.folder / f"{name}.log").open("wb") as log:
            command, environment = self.command(services()[name]["command"]), self.environment(name, **more)
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.running.append(process)

    def stop(self) -> None:
        for process in self.running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def logs(self) -> str:
        return "\n".join(f"{log.name}\n{log.read_text()[-3000:]}" for log in self.folder.glob("*.log"))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, prefect_database: Path) -> Iterator[Stack]:
    """All services, started in dependency order."""
    folder = copied_into(tmp_path_factory.mktemp("stack"), prefect_database)
    load_key(folder / "seal.pem", create=True)
    _public_half(folder)
    signing_settings(folder)
    database, s3, prefect, gateway = free_port(), free_port(), free_port(), free_port()
    places = {
        "postgres:5432": f"127.0.0.1:{database}",
        "s3:8333": f"127.0.0.1:{s3}",
        "prefect-server:4200": f"127.0.0.1:{prefect}",
        "prefect-gateway:4201": f"127.0.0.1:{gateway}",
        "0.0.0.0": "127.0.0.1",
        "4200": str(prefect),
        "4201": str(gateway),
        "5432": str(database),
        "/run/secrets": str(folder),
        "/deploy/": f"{DEPLOY}/",
    }
    moto = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(s3)]
    with ExitStack() as open_until_the_end:
        # The last of two `-h` options wins.
        server = open_until_the_end.enter_context(postgres_server(f"-h 127.0.0.1 -p {database}"))
        open_until_the_end.enter_context(served(moto, s3, folder))
        found = Stack(folder, Path(server._package.bin_path), places)
        open_until_the_end.callback(found.stop)
        _initialise(found, f"postgresql://postgres@127.0.0.1:{database}/postgres", database)
        prefects = os.environ.get("SDP_TEST_PREFECT_DATABASE_URL", f"sqlite+aiosqlite:///{folder}/prefect.db")
        found.start("prefect-server", PREFECT_API_DATABASE_CONNECTION_URL=prefects)
        for name in ("bucket", "migrate"):
            found.once(name)
        found.once("roles", PGHOST="127.0.0.1", PGPORT=str(database))
        found.start("prefect-gateway")
        _wait_for(found, lambda: httpx.get(f"http://127.0.0.1:{gateway}/api/health").is_success)
        found.once("deploy")
        for name in ("sealer", "cpu-worker", "gpu-worker"):
            found.start(name, **{FAKE_ENGINE: "0.1", "PREFECT_WORKER_QUERY_SECONDS": "1"})
        yield found


def _public_half(folder: Path) -> None:
    """Extract the public key as .env.example describes."""
    words = ["openssl", "pkey", "-in", str(folder / "seal.pem"), "-pubout", "-out", str(folder / "seal.pub")]
    subprocess.run(words, check=True, capture_output=True)


def _initialise(stack: Stack, superuser: str, port: int) -> None:
    """Initialise an empty data folder as the image does: the owner, the database, then the mounted script."""
    settings = services()["postgres"]["environment"]
    with psycopg.connect(superuser, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {settings['POSTGRES_USER']} SUPERUSER LOGIN".encode())
        connection.execute(f"CREATE DATABASE {settings['POSTGRES_DB']} OWNER {settings['POSTGRES_USER']}".encode())
    path = f"{stack.bin_path}:{os.environ['PATH']}"
    environment = settings | {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PATH": path}
    subprocess.run(["/bin/sh", DEPLOY / "postgres-init.sh"], env=environment, check=True, capture_output=True)


def _wait_for(stack: Stack, ask: Any, patience_s: float = 120) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        with suppress(httpx.HTTPError):
            if ask():
                return
        assert time.monotonic() < deadline, stack.logs()
        assert [process.args for process in stack.running if process.poll() is not None] == [], stack.logs()
        time.sleep(0.3)


def _made(stack: Stack, api: httpx.Client, path: str, **body: Any) -> str:
    """The id of a new object. A busy SQLite may refuse the request, and it is repeated as Prefect's own client does."""
    answers: list[httpx.Response] = []

    def ask() -> bool:
        answers.append(api.post(path, json=body))
        return answers[-1].is_success

    _wait_for(stack, ask)
    return str(answers[-1].json()["id"])


@pytest.fixture(scope="module")
def api(stack: Stack) -> Iterator[httpx.Client]:
    """Prefect's API as a user with the password."""
    user, _, password = variables()["PREFECT_AUTH"].partition(":")
    with httpx.Client(base_url=f"{stack.here('http://prefect-server:4200')}/api/", auth=(user, password)) as client:
        yield client


def test_every_service_is_accounted_for() -> None:
    assert {*ONCE, *STARTED, *ELSEWHERE} == set(services())


def test_prefect_asks_for_the_password(stack: Stack, api: httpx.Client) -> None:
    assert httpx.post(f"{api.base_url}flows/filter", json={}).status_code == 401
    assert api.post("flows/filter", json={}).status_code == 200


def test_both_workers_are_online(stack: Stack, api: httpx.Client) -> None:
    def online() -> bool:
        pools = {pool["name"]: pool["status"] for pool in api.post("work_pools/filter", json={}).json()}
        return pools == {"cpu": "READY", "gpu": "READY"}

    _wait_for(stack, online)


def test_a_campaign_is_worked_through_the_pool(stack: Stack, api: httpx.Client) -> None:
    file = stack.folder / "campaign.yaml"
    file.write_text(CAMPAIGN)
    stack.once("cpu-worker", "sdpipeline", "submit", file)
    deployed = api.get("deployments/name/gpu-worker/gpu-worker").raise_for_status().json()["id"]
    run = _made(stack, api, f"deployments/{deployed}/create_flow_run", state={"type": "SCHEDULED"})
    final = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
    _wait_for(stack, lambda: api.get(f"flow_runs/{run}").json().get("state_type") in final)
    assert api.get(f"flow_runs/{run}").json()["state_type"] == "COMPLETED", stack.logs()
    assert '"succeeded": 4' in stack.once("gpu-worker", "sdpipeline", "status", "composed", "--json")


def test_the_sealer_seals_under_object_lock_and_the_dispatcher_verifies_and_cannot_seal(stack: Stack) -> None:
    stack.once("sealer", "sdpipeline", "audit", "seal")
    assert '"ok": true' in stack.once("cpu-worker", "sdpipeline", "audit", "verify", "--json")
    command = stack.command(["sdpipeline", "audit", "seal"])
    refused = subprocess.run(command, env=stack.environment("cpu-worker"), capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "SDP_SIGNING__SEAL_KEY_FILE: is not set" in refused.stderr
    database = psycopg.connect(stack.environment("cpu-worker")["SDP_DATABASE_URL"])
    with database, pytest.raises(psycopg.errors.InsufficientPrivilege):
        database.execute("INSERT INTO audit_seal (number) VALUES (99)")


def test_the_s3_port_is_forwarded(stack: Stack) -> None:
    haproxy = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if haproxy is None:
        pytest.skip("haproxy is not installed (Debian: haproxy)")
    port, behind = free_port(), stack.here("s3:8333")
    text = composed()["configs"]["s3-port"]["content"].replace(":8333", f"127.0.0.1:{port}")
    (stack.folder / "haproxy.cfg").write_text(text.replace("127.0.0.1:8334", behind))
    with served([haproxy, "-db", "-f", str(stack.folder / "haproxy.cfg")], port, stack.folder):
        stack.once("bucket", SDP_S3__ENDPOINT_URL=f"http://127.0.0.1:{port}")
