"""A worker's memory after twenty thousand jobs, against that after its first thousand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import open_database
from sdpipeline.db.migrate import upgrade
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.storage import LocalStore
from sdpipeline.worker import Worker, WorkerLimits
from tests.factories import chains, published, signing_key
from tests.integration.databases import processes

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

JOBS = int(os.environ.get("SDP_TEST_BENCH_JOBS", "20000"))
FIRST = JOBS // 20
MOST_GROWTH = 0.05


def _work(answers: Any, url: str, folder: Path) -> None:
    database, me = open_database(url), psutil.Process()
    done = 0
    resident = dict[int, float]()

    def on_progress(ended: int) -> None:
        nonlocal done
        done += ended
        if done % FIRST == 0:
            resident[done] = me.memory_info().rss / 2**20

    limits = WorkerLimits(max_batch=8, lease_ttl_s=60.0, max_pixels=10_000_000)
    worker = Worker("bench", AuditLog(database, actor="bench"), LocalStore(folder), FakeEngine(), limits, signing_key())
    worker.run(on_progress=on_progress)
    database.close()
    answers.put(resident)


def test_a_worker_needs_no_more_memory_after_twenty_thousand_jobs(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'queue.db'}"
    database = open_database(url)
    upgrade(database)
    published(AuditLog(database, actor="bench"), chains(JOBS))
    database.close()
    answers: Any = processes.SimpleQueue()
    child = processes.Process(target=_work, args=(answers, url, tmp_path / "storage"))
    child.start()
    resident: dict[int, float] = answers.get()
    child.join()
    print(", ".join(f"{done:,}: {mib:.1f} MiB" for done, mib in resident.items()))
    assert resident[JOBS] <= (1 + MOST_GROWTH) * resident[FIRST]
