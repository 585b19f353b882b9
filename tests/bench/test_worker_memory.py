"""Memory of a worker and its delivery process after five thousand pictures, compared with that after the first ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdpipeline.app import factories, keys, services, workers
from sdpipeline.engine.fake import FakeEngine
from tests.factories import chains, published
from tests.integration.processes import processes

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

JOBS = int(os.environ.get("SDP_TEST_BENCH_JOBS", "5000"))
FIRST = JOBS // 20
MAX_GROWTH = 0.05


def _work(answers: Any, home: Path) -> None:
    s, me = services.load_settings(home), psutil.Process()
    key, done = keys.picture_key(s), 0
    resident = dict[int, dict[str, float]]()

    def on_progress(ended: int) -> None:
        nonlocal done
        done += ended
        if done % FIRST == 0:
            (delivery,) = me.children()
            both = {"worker": me, "delivery": delivery}
            resident[done] = {name: process.memory_info().rss / 2**20 for name, process in both.items()}

    with (
        services.open_services(s) as have,
        factories.delivery_process(s, key, have.database, s.storage) as (worker_id, deliverer),
    ):
        worker = factories.make_worker(
            s, have.database, have.store, FakeEngine(), key, worker_id=worker_id, deliverer=deliverer
        )
        with workers.registered(s, worker, "cpu"):
            worker.run(on_progress=on_progress)
    answers.put(resident)


def test_neither_a_worker_nor_its_delivery_process_needs_more_memory_after_five_thousand_pictures(
    tmp_path: Path,
) -> None:
    with services.open_services(services.load_settings(tmp_path)) as have:
        published(have.audit, chains(JOBS))
    answers: Any = processes.SimpleQueue()
    child = processes.Process(target=_work, args=(answers, tmp_path))
    child.start()
    resident: dict[int, dict[str, float]] = answers.get()
    child.join()
    for name in ("worker", "delivery"):
        print(name, ", ".join(f"{done:,}: {mib[name]:.1f} MiB" for done, mib in resident.items()))
    for name in ("worker", "delivery"):
        assert resident[JOBS][name] <= (1 + MAX_GROWTH) * resident[FIRST][name], name
