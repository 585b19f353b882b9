"""Sixty-four workers on one PostgreSQL: lease latency and device idle time. Also the server's cost of each transition,
from which the README in this folder extrapolates to a thousand GPUs."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from sdpipeline.db import budgets, leasing, queue
from sdpipeline.db.audit import AuditLog, Event, Transaction
from sdpipeline.db.connection import Database, open_database
from sdpipeline.engine import Batch, GeneratedImage, GenerationFailure
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.jobs import Lease, LeasedJob
from sdpipeline.storage import LocalStore
from sdpipeline.worker.worker import Worker, WorkerLimits
from tests.chaos.postgres import PostgresServer, postgres_server
from tests.factories import chains, published, signing_key, stored_image
from tests.integration.processes import processes

pytestmark = [pytest.mark.bench, pytest.mark.timeout(600)]

WORKERS, PROCESSES = 64, 4
BATCH = 8
SECONDS_PER_BATCH = 8.0
RUN_S = 80.0
STAGGER_S = 8.0
LEASE_TTL_S = 60.0
MAX_WAITING = 0.01
LEASES = 300


@dataclass(slots=True)
class Times:
    """Measurements of one worker, in seconds; ``device`` holds begin and end of each of its batches."""

    leases: list[float] = field(default_factory=list)
    completions: list[float] = field(default_factory=list)
    device: list[tuple[float, float]] = field(default_factory=list)
    database: float = 0.0

    @property
    def span(self) -> float:
        """Seconds from the start of its first batch to the end of its last."""
        return self.device[-1][1] - self.device[0][0] if self.device else 0.0

    @property
    def idle(self) -> float:
        """Seconds that the device was idle between batches."""
        return sum(after[0] - before[1] for before, after in zip(self.device, self.device[1:], strict=False))


class TimedLog(AuditLog):
    """Audit log that measures each transaction, including its commit and the wait for a lock."""

    def __init__(self, database: Database, times: Times) -> None:
        super().__init__(database, actor="bench")
        self.times = times

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        started = time.perf_counter()
        with super().transaction() as tx:
            yield tx
        took = time.perf_counter() - started
        events = {about["event"] for about in tx._events}
        if Event.LEASE_TAKEN in events:
            self.times.leases.append(took)
        elif Event.JOB_SUCCEEDED in events:
            self.times.completions.append(took)


class TimedEngine(FakeEngine):
    """Engine that records when the device was busy."""

    def __init__(self, times: Times) -> None:
        super().__init__(seconds_per_batch=SECONDS_PER_BATCH)
        self.times = times

    def generate(self, batch: Batch) -> Sequence[GeneratedImage | GenerationFailure]:
        started = time.perf_counter()
        made = super().generate(batch)
        self.times.device.append((started, time.perf_counter()))
        return made


def _time_device_thread(database: Database, times: Times) -> None:
    """Sum up how long the device thread holds a database connection."""
    me = threading.get_ident()

    @event.listens_for(database.writer, "checkout")
    def begun(_connection: Any, record: Any, _proxy: Any) -> None:
        record.info["begun"] = time.perf_counter()

    @event.listens_for(database.writer, "checkin")
    def ended(_connection: Any, record: Any) -> None:
        if threading.get_ident() == me and times.device:
            times.database += time.perf_counter() - record.info["begun"]


def _work(url: str, folder: Path, name: str, times: Times) -> None:
    time.sleep(random.uniform(0, STAGGER_S))
    database = open_database(url)  # its own connections, as in a worker process
    _time_device_thread(database, times)
    limits = WorkerLimits(max_batch=BATCH, lease_ttl_s=LEASE_TTL_S, max_pixels=10_000_000)
    worker = Worker(name, TimedLog(database, times), LocalStore(folder), TimedEngine(times), limits, signing_key())
    stop = threading.Event()
    threading.Timer(RUN_S, stop.set).start()
    worker.run(until_idle=False, stop=stop)
    database.close()


def _work_together(answers: Any, url: str, folder: Path, number: int) -> None:
    found = [Times() for _ in range(WORKERS // PROCESSES)]
    threads = [
        threading.Thread(target=_work, args=(url, folder, f"worker-{number}-{place}", times))
        for place, times in enumerate(found)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers.put(found)


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A server that allows three connections per worker, which exceeds PostgreSQL's default limit."""
    with postgres_server("-c max_connections=300") as started:
        yield started


def test_sixty_four_workers_do_not_wait_for_the_database(server: PostgresServer, tmp_path: Path) -> None:
    url = server.new_database("load")
    database = open_database(url)
    published(AuditLog(database, actor="bench"), chains(8_000))
    before, cpu, started = _statistic(database, "xact_commit"), server.cpu_seconds(), time.perf_counter()
    answers: Any = processes.SimpleQueue()
    crew = [processes.Process(target=_work_together, args=(answers, url, tmp_path, n)) for n in range(PROCESSES)]
    for process in crew:
        process.start()
    found: list[Times] = [times for _ in crew for times in answers.get()]
    for process in crew:
        process.join()
    took = time.perf_counter() - started
    sessions = _statistic(database, "sessions")
    commits, cpu = _statistic(database, "xact_commit") - before, server.cpu_seconds() - cpu
    database.close()
    span = sum(times.span for times in found)
    idle, waiting = (sum(getattr(times, name) for times in found) / span for name in ("idle", "database"))
    leases = [lease for times in found for lease in times.leases]
    completions = [completion for times in found for completion in times.completions]
    print(f"{WORKERS} workers, {SECONDS_PER_BATCH} s a batch of {BATCH}: {len(completions) / took:.1f} pictures/s")
    print(f"lease      p50 {_percentile(leases, 50):6.1f} ms, p99 {_percentile(leases, 99):6.1f} ms of {len(leases)}")
    print(f"completion p50 {_percentile(completions, 50):6.1f} ms, p99 {_percentile(completions, 99):6.1f} ms")
    print(f"devices waited for the database {waiting:.3%} of the time, for anything at all {idle:.3%}")
    print(f"server: {cpu / took:.1%} of a core, {commits / took:.0f} commits/s, {sessions} connections")
    assert waiting < MAX_WAITING


def test_what_each_transition_costs_the_server(server: PostgresServer) -> None:
    database = open_database(server.new_database("costs"))
    log = AuditLog(database, actor="bench")
    published(log, chains(LEASES * BATCH))
    leases: list[Lease] = []
    costs: dict[str, tuple[float, float, float]] = {}
    charge = budgets.Charge(worker_id="bench", gpu_seconds=1.0, cost=0.0)
    cursor = leasing.Cursor()

    def lease() -> None:
        with log.transaction() as tx:
            queue.reap(tx)
            queue.promote(tx.connection)
            budgets.admit(tx, wave=BATCH, gpu_second_cost=0.0)
            taken = leasing.take_lease(tx, worker_id="bench", limit=BATCH, ttl_s=LEASE_TTL_S, cursor=cursor)
        assert taken is not None
        leases.append(taken)

    def heartbeat() -> None:
        with database.write() as connection:
            leasing.renew(connection, [leases[0].id], ttl_s=LEASE_TTL_S)

    def look() -> None:
        with database.read() as connection:
            leasing.lease_state(connection, leases[0].id)

    def complete(each: Lease, job: LeasedJob) -> None:
        with log.transaction() as tx:
            assert queue.complete(tx, lease_id=each.id, leased=job, stored=stored_image(job), charge=charge)

    def close(each: Lease) -> None:
        with database.write() as connection:
            leasing.close_lease(connection, each.id)

    costs["lease of 8"] = _cost(server, database, [lease] * LEASES)
    costs["heartbeat"] = _cost(server, database, [heartbeat] * LEASES * BATCH)
    costs["look"] = _cost(server, database, [look] * LEASES * BATCH)
    costs["completion"] = _cost(server, database, [_later(complete, each, job) for each in leases for job in each.jobs])
    costs["closing"] = _cost(server, database, [_later(close, each) for each in leases])
    database.close()
    for name, (cpu, wall, wal) in costs.items():
        print(
            f"{name:11} {cpu * 1e3:6.3f} ms of the server's CPU, {wall * 1e3:6.2f} ms in all, {wal:7,.0f} bytes of WAL"
        )
    batch = costs["lease of 8"][0] + BATCH * costs["completion"][0] + costs["look"][0] + costs["closing"][0]
    print(f"a batch of {BATCH}: {batch * 1e3:.2f} ms of the server's CPU")


def _later(act: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    return lambda: act(*arguments)


def _cost(server: PostgresServer, database: Database, acts: Sequence[Callable[[], None]]) -> tuple[float, float, float]:
    """CPU seconds of the server, wall seconds and WAL bytes per transition."""
    cpu, wal, started = server.cpu_seconds(), _wal_bytes(database), time.perf_counter()
    for act in acts:
        act()
    took = time.perf_counter() - started
    used = server.cpu_seconds() - cpu, took, _wal_bytes(database) - wal
    return used[0] / len(acts), used[1] / len(acts), used[2] / len(acts)


def _statistic(database: Database, name: str) -> int:
    with database.read() as connection:
        statement = f"SELECT {name} FROM pg_stat_database WHERE datname = current_database()"
        return int(connection.execute(text(statement)).scalar_one())


def _wal_bytes(database: Database) -> int:
    with database.read() as connection:
        return int(connection.execute(text("SELECT pg_current_wal_lsn() - '0/0'")).scalar_one())


def _percentile(seconds: Sequence[float], percent: int) -> float:
    """A percentile, in milliseconds."""
    return sorted(seconds)[min(len(seconds) - 1, len(seconds) * percent // 100)] * 1e3
