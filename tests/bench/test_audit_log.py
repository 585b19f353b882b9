"""A million audit events: written in batches, sealed, exported, and verified from the export alone."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdpipeline.audit import load_key, seal
from sdpipeline.audit.export import write
from sdpipeline.audit.offline import verify_export
from sdpipeline.db.audit import AuditLog, Event
from sdpipeline.db.connection import Database, open_database
from sdpipeline.db.migrate import upgrade
from sdpipeline.storage import LocalStore
from tests.integration.processes import processes

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

EVENTS = int(os.environ.get("SDP_TEST_BENCH_EVENTS", "1000000"))
BATCH = 500
WRITERS = 20
MIN_SEALED_PER_S = 5_000
LONGEST_CHECK_S = 60.0
MAX_GROWTH_MIB = 32.0


def _fill(log: AuditLog, count: int) -> None:
    """Write events as large as those of a successful job."""
    picture = {"key": f"default/spring/draft/{'f' * 64}/{'a' * 64}.png", "sha256": "a" * 64, "size_bytes": 123456}
    for start in range(0, count, BATCH):
        with log.transaction() as tx:
            for n in range(start, min(count, start + BATCH)):
                tx.record(Event.JOB_SUCCEEDED, f"job:{n}", attempt=1, worker="w" * 32, image=picture)


def _timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return the result, wall seconds and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    done = work()
    return done, time.perf_counter() - wall, time.process_time() - cpu


def _check(answers: Any, path: Path) -> None:
    """Verify an export in a separate process, so that its memory can be measured; a small export is verified first."""

    def read(file: Path) -> Any:
        with file.open("rb") as lines:
            return verify_export(lines)

    read(path.with_suffix(".small"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found, wall, cpu = _timed(lambda: read(path))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    answers.put((found.document(), wall, cpu, before, grown))


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    url = f"sqlite:///{tmp_path / 'q.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    opened = open_database(url)
    upgrade(opened)
    yield opened
    opened.close()


def test_a_million_events_are_sealed_and_checked_in_time(database: Database, tmp_path: Path) -> None:
    key, store, path = load_key(tmp_path / "seal.pem", create=True), LocalStore(tmp_path / "s"), tmp_path / "log.jsonl"
    logs = [AuditLog(database, actor=f"bench:{n}") for n in range(WRITERS)]
    _fill(logs[0], 1000)
    seal(database, store, key)
    with path.with_suffix(".small").open("wb") as file:
        write(database, key, file)

    def fill() -> None:
        for log in logs:
            _fill(log, EVENTS // WRITERS)

    _, wall, cpu = _timed(fill)
    print(f"\n{database.writer.dialect.name}: {EVENTS:,} events written in {wall:.1f} s, CPU {cpu:.1f} s")
    sealed, wall, cpu = _timed(lambda: seal(database, store, key))
    print(f"sealed in {wall:.1f} s ({sealed / wall:,.0f}/s), CPU {cpu:.1f} s ({sealed / cpu:,.0f}/s)")
    assert sealed / cpu >= MIN_SEALED_PER_S
    _fill(logs[0], 5000)
    sealed, wall, cpu = _timed(lambda: seal(database, store, key))
    print(f"the next {sealed:,} sealed in {wall:.2f} s, CPU {cpu:.2f} s")
    with path.open("wb") as file:
        _, wall, cpu = _timed(lambda: write(database, key, file))
    print(f"exported {path.stat().st_size / 1e6:.0f} MB in {wall:.1f} s, CPU {cpu:.1f} s")
    answers: Any = processes.SimpleQueue()
    child = processes.Process(target=_check, args=(answers, path))
    child.start()
    found, wall, cpu, before, grown = answers.get()
    child.join()
    print(f"checked in {wall:.1f} s, CPU {cpu:.1f} s; {before:.0f} MiB after 1,000 events, then {grown:.1f} MiB more")
    assert (found["ok"], found["events"]) == (True, EVENTS + 6000)
    assert cpu < LONGEST_CHECK_S
    assert grown < MAX_GROWTH_MIB
