"""What Prefect costs: what of their time two workers' devices wait, and what the server's CPU spends on pictures."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import func, select

from sdpipeline import bootstrap
from sdpipeline.db.connection import Database
from sdpipeline.db.tables import attempt
from sdpipeline.prefect_server import own_server
from tests.integration.commands import FAKE_ENGINE, SDPIPELINE, environment

pytestmark = [pytest.mark.bench, pytest.mark.timeout(600)]

WORKERS, BATCH, SECONDS_PER_BATCH = 2, 8, 1.0
BATCHES_EACH = 100  # two chunks of 45 s and a part: their boundaries, where Prefect is spoken to, count
MOST_OVERHEAD = 0.01
CAMPAIGN = f"""\
name: overhead
checkpoint: shapes
seeds: {{start: 0, count: {WORKERS * BATCH * BATCHES_EACH}}}
defaults: {{width: 64, height: 64, num_inference_steps: 1, guidance_scale: 1.0}}
stages:
  - {{id: draft, task: text-to-image, prompt: a red circle}}
"""


def test_devices_of_a_campaign_under_prefect_hardly_wait(tmp_path: Path) -> None:
    (tmp_path / "campaign.yaml").write_text(CAMPAIGN)
    fake = {FAKE_ENGINE: str(SECONDS_PER_BATCH), "SDP_ENGINE__MAX_BATCH": str(BATCH), "SDP_WORKERS": str(WORKERS)}
    with own_server(tmp_path / "prefect") as server:
        assert server.pid is not None
        process = psutil.Process(server.pid)
        idle = _cpu_of_an_idle_minute(process) / 60
        before, started = _cpu_seconds(process), time.monotonic()
        command = [*SDPIPELINE, "run", str(tmp_path / "campaign.yaml"), "--home", str(tmp_path / "home")]
        subprocess.run(command, env=environment(PREFECT_API_URL=server.api_url, **fake), check=True)
        wall = time.monotonic() - started
        time.sleep(15)  # what it still writes down belongs to the campaign
        cpu = _cpu_seconds(process) - before
    with bootstrap.services(bootstrap.load_settings(tmp_path / "home")) as have:
        workers = _workers(have.database)
    pictures = sum(worker["pictures"] for worker in workers)
    for worker in workers:
        print(f"{worker['pictures']} pictures in {worker['span']:.1f} s: outside the engine {worker['outside']:.2%}")
    print(f"the command took {wall:.1f} s, the engines {pictures / BATCH / WORKERS * SECONDS_PER_BATCH:.1f} s each")
    print(
        f"server: {1000 * cpu / pictures:.2f} s of CPU for 1,000 pictures, of which idling {idle * (wall + 15):.1f} s"
    )
    assert len(workers) == WORKERS
    assert max(worker["outside"] for worker in workers) < MOST_OVERHEAD


def _cpu_of_an_idle_minute(process: psutil.Process) -> float:
    time.sleep(10)  # it has just started
    before = _cpu_seconds(process)
    time.sleep(20)
    return 3 * (_cpu_seconds(process) - before)


def _cpu_seconds(process: psutil.Process) -> float:
    used = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return float(sum(each.user + each.system for each in used))


def _workers(database: Database) -> list[Any]:
    """Of each worker, from the end of its first batch to that of its last: the seconds, and the share that its engine
    did not run in: leasing, storing, committing and Prefect's chunks between."""
    done = (
        select(
            attempt.c.worker_id,
            attempt.c.lease_id,
            func.max(attempt.c.finished_at).label("ended"),
            func.sum(attempt.c.gpu_seconds).label("engine"),
            func.count().label("pictures"),
        )
        .where(attempt.c.outcome == "succeeded")
        .group_by(attempt.c.worker_id, attempt.c.lease_id)
        .order_by(func.max(attempt.c.finished_at))
    )
    with database.read() as connection:
        batches = connection.execute(done).all()
    found = []
    for worker_id in sorted({batch.worker_id for batch in batches}):
        mine = [batch for batch in batches if batch.worker_id == worker_id]
        span = mine[-1].ended - mine[0].ended
        engine = sum(batch.engine for batch in mine[1:])
        pictures = sum(batch.pictures for batch in mine)
        found.append({"pictures": pictures, "span": span, "outside": 1 - engine / span})
    return found
