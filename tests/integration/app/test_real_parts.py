"""PostgreSQL, S3 over HTTP and the user's own Prefect server, set up as the documentation describes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import NullPool, create_engine, text

from sdpipeline import provenance
from sdpipeline.audit import load_key
from tests.integration.certificates import signing_settings
from tests.integration.commands import document, environment, pictures, sdpipeline
from tests.integration.conftest import Bucket, free_port, served

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "how-to" / "postgresql-s3-prefect.md"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def prefect_api_url(tmp_path: Path) -> Iterator[str]:
    """A Prefect server started by hand."""
    port = free_port()
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with served(command, port, tmp_path, environment=environment(PREFECT_HOME=str(tmp_path / "prefect"))):
        yield f"http://127.0.0.1:{port}/api"


@pytest.fixture
def real_parts(postgres_url: str, moto_bucket: Bucket, prefect_api_url: str, tmp_path: Path) -> dict[str, str]:
    """The settings that the page names, with this test's servers."""
    return {
        "SDP_DATABASE_URL": postgres_url,
        "SDP_STORAGE_URL": f"s3://{moto_bucket.name}/production",
        "SDP_S3__ENDPOINT_URL": moto_bucket.endpoint_url,
        "PREFECT_API_URL": prefect_api_url,
        "SDP_SIGNING__SEAL_KEY_FILE": str(tmp_path / "seal.pem"),
        **signing_settings(tmp_path),
    }


def _commands(settings: dict[str, str]) -> list[str]:
    """The page's commands. Its exports are compared with the test's settings and left out."""
    block = PAGE.read_text(encoding="utf-8").split("```sh\n")[1].split("```")[0]
    lines = [line for line in block.splitlines() if not line.startswith("pip ")]
    exported = [found[1] for line in lines if (found := re.match(r"export (\w+)=", line))]
    assert exported == list(settings)
    return [line for line in lines if not line.startswith("export ")]


def _bash(line: str, settings: dict[str, str], home: Path) -> subprocess.CompletedProcess[str]:
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        env=environment(**settings, PATH=programs, SDP_HOME=str(home), SDP_S3__ADDRESSING_STYLE="path"),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.long
def test_the_demo_campaign_makes_the_same_pixels_on_real_parts_set_up_as_the_readme_says(
    real_parts: dict[str, str], moto_bucket: Bucket, demo_home: Path, tmp_path: Path
) -> None:
    for line in _commands(real_parts):
        done = _bash(line, real_parts, tmp_path / "home")
        assert done.returncode == 0, f"{line}\n{done.stderr}{done.stdout}"
    settings = real_parts | {"SDP_HOME": str(tmp_path / "home"), "SDP_S3__ADDRESSING_STYLE": "path"}
    assert document("audit", "verify", given=settings)["images"] == 24
    verified = document("verify", f"{real_parts['SDP_STORAGE_URL']}/default/demo/", given=settings)
    assert {each["c2pa"] for each in verified["pictures"]} == {"trusted"}
    made = document("jobs", "demo", given=settings)["jobs"]
    assert {job["status"] for job in made} == {"succeeded"}
    assert all(job["image"]["url"].startswith(real_parts["SDP_STORAGE_URL"]) for job in made)
    engine = create_engine(real_parts["SDP_DATABASE_URL"], poolclass=NullPool)
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT fingerprint, pixels_sha256, key FROM image")).all()
    there = {row.fingerprint: row for row in rows}
    embedded = [document("show", job["id"], "--home", demo_home) for job in pictures(demo_home, "demo")]
    here = {shown["fingerprint"]: shown["pictures"][0] for shown in embedded}
    assert there.keys() == here.keys()
    store = moto_bucket.store("production")
    for fingerprint, picture in here.items():
        if there[fingerprint].pixels_sha256 != picture["pixels_sha256"]:
            _differ_by_their_batches(
                Path(picture["url"].removeprefix("file://")).read_bytes(), store.get(there[fingerprint].key)
            )


def _differ_by_their_batches(*files: bytes) -> None:
    """Batch composition is chance on a busy machine, and bits differ slightly between batch sizes."""
    buckets = {(provenance.read_record(data) or {})["ran"]["bucket"] for data in files}
    assert len(buckets) == 2, "other pixels out of equal batches"
    one, other = (provenance.decode(data, max_pixels=2**24).astype(float) for data in files)
    assert np.abs(one - other).mean() < 1.0


def test_a_postgresql_database_that_was_not_upgraded_is_refused_naming_the_command(postgres_url: str) -> None:
    done = sdpipeline("submit", ROOT / "sdpipeline/demo/campaign.yaml", SDP_DATABASE_URL=postgres_url)
    assert done.returncode == 2
    assert "sdpipeline db upgrade" in done.stderr


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("SDP_DATABASE_URL", "postgresql://nobody:hidden-word@127.0.0.1:9/none"),
        ("SDP_DATABASE_URL", "postgresql://nobody:hidden-word@127.0.0.1:SILENT/none"),
        ("SDP_STORAGE_URL", "s3://no-such-bucket/prefix"),
        ("PREFECT_API_URL", "http://127.0.0.1:9/api"),
        ("PREFECT_API_URL", "http://127.0.0.1:SILENT/api"),
    ],
)
def test_a_part_that_does_not_answer_is_refused_in_time_naming_its_setting(
    name: str, address: str, silent_port: int, tmp_path: Path, s3_credentials: None
) -> None:
    address = address.replace("SILENT", str(silent_port))
    seal_key = tmp_path / "seal.pem"
    load_key(seal_key, create=True)
    settings = {
        "SDP_SIGNING__SEAL_KEY_FILE": str(seal_key),
        **signing_settings(tmp_path),
        "SDP_S3__ENDPOINT_URL": "http://127.0.0.1:9",
        name: address,
    }
    started = time.monotonic()
    done = sdpipeline("run", ROOT / "sdpipeline/demo/campaign.yaml", "--home", tmp_path / "home", "--json", **settings)
    assert time.monotonic() - started < 25  # the command gives up after 15 seconds, and this machine is shared
    assert done.returncode == 2, done.stderr
    errors: list[dict[str, Any]] = json.loads(done.stdout)["errors"]
    assert [error["key"] for error in errors] == [name]
    assert errors[0]["fix"]
    assert "hidden-word" not in done.stdout + done.stderr
