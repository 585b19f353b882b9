"""Maintenance flows under a real Prefect server: they do what is due, and fail if they find a fault."""

from __future__ import annotations

from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import pytest

from sdpipeline import orchestration
from sdpipeline.app import services, submit, workers
from sdpipeline.flows import maintenance
from sdpipeline.orchestration.local_server import ServerHandle, own_server
from sdpipeline.settings import Settings
from tests.factories import leased, statuses
from tests.integration.commands import credentials

pytestmark = pytest.mark.timeout(180)

CAMPAIGN = """\
name: spring
checkpoint: shapes
seeds: {start: 0, count: 8}
defaults: {width: 64, height: 64, num_inference_steps: 1, guidance_scale: 1.0}
stages:
  - {id: draft, task: text-to-image, prompt: a red circle}
"""


@pytest.fixture
def server(prefect_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerHandle]:
    """A Prefect server, and a home named by the environment, as for a deployed flow."""
    monkeypatch.setenv("SDP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SDP_ENGINE__FAKE_SECONDS_PER_BATCH", "0")
    monkeypatch.setenv("PREFECT_LOGGING_TO_API_ENABLED", "false")
    with own_server(prefect_home) as own:
        for name, value in own.environment.items():
            monkeypatch.setenv(name, value)
        with orchestration.prefect_server(services.load_settings()):
            yield own


@pytest.fixture
def spring(server: ServerHandle, tmp_path: Path) -> Settings:
    """A submitted campaign."""
    (tmp_path / "spring.yaml").write_text(CAMPAIGN)
    settings = services.load_settings()
    with submit.open_to_submit(settings, tmp_path / "spring.yaml") as have:
        submit.submit(have, tmp_path / "spring.yaml")
    return settings


def ended(flow: Any, **parameters: Any) -> tuple[str, str]:
    """The final state of a run, and its message."""
    state = flow(**parameters, return_state=True)
    return str(state.type.value), str(state.message)


def test_reclaiming_makes_ready_what_dead_workers_held(spring: Settings) -> None:
    with services.open_services(spring) as have:
        lease = leased(have.audit)
        with have.audit.transaction() as tx:
            tx.connection.exec_driver_sql("UPDATE lease SET expires_at = 0")
        assert ended(maintenance.reclaim) == (
            "COMPLETED",
            f"{len(lease.jobs)} jobs of dead workers are ready again, 0 jobs waited long enough",
        )
        assert set(statuses(have.database)) == {"ready"}


@pytest.mark.long
def test_maintenance_fails_where_a_picture_is_missing_until_it_is_repaired(
    spring: Settings, server: ServerHandle
) -> None:
    workers.run_worker(spring, campaign="spring", until_idle=True, device="cpu")
    assert ended(maintenance.seal)[0] == "COMPLETED"
    assert ended(maintenance.audit_verify, sample=2)[0] == "COMPLETED"
    assert ended(maintenance.reconcile) == ("COMPLETED", "0 findings, nothing left to do")
    assert ended(maintenance.retention) == ("COMPLETED", "0 pictures, 0 prompts, 0 sources, 0 editions")
    victim = next((spring.home / "storage" / "default").rglob("*.png"))
    victim.unlink()
    kind, message = ended(maintenance.audit_verify)
    assert (kind, message.split(":")[0]) == ("FAILED", "1 faults")
    assert ended(maintenance.reconcile)[0] == "FAILED"
    tables = (
        httpx.post(f"{server.api_url}/artifacts/latest/filter", json={}, auth=credentials(server))
        .raise_for_status()
        .json()
    )
    assert victim.name in unescape(str([each["data"] for each in tables if each["key"] == "reconcile-faults"]))
    assert ended(maintenance.reconcile, repair=True)[0] == "COMPLETED"
    assert ended(maintenance.reconcile)[0] == "COMPLETED"


def test_a_flow_that_nobody_told_of_a_database_says_so(
    server: ServerHandle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SDP_HOME")
    monkeypatch.chdir(tmp_path)
    kind, message = ended(maintenance.seal)
    assert kind == "FAILED"
    assert "SDP_DATABASE_URL: is not set where this flow runs" in message
    assert not (tmp_path / "sdp-home").exists()
