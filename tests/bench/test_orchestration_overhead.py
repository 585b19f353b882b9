"""Overhead of Prefect: idle time of two workers' devices, and the server's CPU time per picture."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil
import pytest
from sqlalchemy import func, select

from sdpipeline.app import services
from sdpipeline.db.tables import attempt
from sdpipeline.orchestration.local_server import own_server
from tests.integration.commands import FAKE_ENGINE, SDPIPELINE, environment

pytestmark = [pytest.mark.bench, pytest.mark.timeout(600)]

WORKERS, BATCH, SECONDS_PER_BATCH = 2, 8, 1.0
BATCHES_EACH = 70  # longer than a chunk of 45 s, so that at least one Prefect task ends between two counts
MAX_OVERHEAD = 0.01
SETTLE_S = 15.0  # events that the server still writes belong to the campaign
CAMPAIGN = f"""\
name: overhead
checkpoint: shapes
seeds: {{start: 0, count: {WORKERS * BATCH * BATCHES_EACH}}}
defaults: {{width: 64, height: 64, num_inference_steps: 1, guidance_scale: 1.0}}
stages:
  - {{id: draft, task: text-to-image, prompt: a red circle}}
"""
FAKE = {FAKE_ENGINE: str(SECONDS_PER_BATCH), "SDP_ENGINE__MAX_BATCH": str(BATCH), "SDP_WORKERS": str(WORKERS)}


def test_devices_of_a_campaign_under_prefect_hardly_wait(tmp_path: Path) -> None:
    (tmp_path / "campaign.yaml").write_text(CAMPAIGN)
    cpu, pictures = _under_prefect(tmp_path)
    _without_prefect(tmp_path)
    under, without = (_outside_the_engine(tmp_path / name) for name in ("under", "without"))
    print(f"outside the engine: {under:.2%} of the time under Prefect, {without:.2%} without: {under - without:+.2%}")
    print(f"server: {1000 * cpu / pictures:.2f} s of CPU for 1,000 pictures")
    assert under < MAX_OVERHEAD


def _under_prefect(folder: Path) -> tuple[float, int]:
    """Run the campaign; return the server's CPU seconds and the number of pictures."""
    with own_server(folder / "server") as server:
        assert server.pid is not None
        process = psutil.Process(server.pid)
        before, started = _cpu_seconds(process), time.monotonic()
        _finish(_command(folder, "under", "run", folder / "campaign.yaml", **server.environment))
        pictures_s = BATCHES_EACH * SECONDS_PER_BATCH
        print(f"the command took {time.monotonic() - started:.1f} s, of which {pictures_s} s pictures")
        time.sleep(SETTLE_S)
        return _cpu_seconds(process) - before, WORKERS * BATCH * BATCHES_EACH


def _without_prefect(folder: Path) -> None:
    """Run the same campaign with as many workers outside a flow."""
    _finish(_command(folder, "without", "submit", folder / "campaign.yaml"))
    _finish(*(_command(folder, "without", "worker", "--until-idle") for _ in range(WORKERS)))


def _command(folder: Path, home: str, *words: object, **settings: str) -> subprocess.Popen[bytes]:
    command = [*SDPIPELINE, *map(str, words), "--home", str(folder / home)]
    return subprocess.Popen(command, env=environment(**FAKE, **settings), stdout=subprocess.DEVNULL)


def _finish(*processes: subprocess.Popen[bytes]) -> None:
    assert [process.wait() for process in processes] == [0] * len(processes)


def _cpu_seconds(process: psutil.Process) -> float:
    used = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return float(sum(each.user + each.system for each in used))


def _outside_the_engine(home: Path) -> float:
    """Share of the time between the first and the last batch in which a worker's engine was idle: leasing, storing,
    committing, and the Prefect chunks in between."""
    done = (
        select(
            attempt.c.worker_id,
            func.max(attempt.c.finished_at).label("ended"),
            func.sum(attempt.c.gpu_seconds).label("engine_s"),
        )
        .where(attempt.c.outcome == "succeeded")
        .group_by(attempt.c.worker_id, attempt.c.lease_id)
        .order_by(func.max(attempt.c.finished_at))
    )
    with services.open_services(services.load_settings(home)) as have, have.database.read() as connection:
        batches = connection.execute(done).all()
    workers = [[batch for batch in batches if batch.worker_id == one] for one in {batch.worker_id for batch in batches}]
    assert len(workers) == WORKERS
    span = sum(mine[-1].ended - mine[0].ended for mine in workers)
    return float(1 - sum(batch.engine_s for mine in workers for batch in mine[1:]) / span)
