"""Workers killed and frozen beyond their leases: every job has exactly one recorded picture, whatever dies."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from sqlalchemy import select

from sdpipeline.audit import load_key, seal, verify
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database
from sdpipeline.db.tables import image, job
from sdpipeline.domain import TERMINAL
from sdpipeline.storage import LocalStore
from tests.chaos import worker_process
from tests.factories import chains, events, published, statuses

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(0)]

SOAK_S = float(os.environ.get("SDP_TEST_SOAK_S", "0"))
CHAOS_S = SOAK_S or 3.0
SEEDS = range(5) if SOAK_S else range(1)
WORKERS = 3
LEASE_TTL_S = 1.0
MAX_ATTEMPTS = 20
PATIENCE_S = 120.0


class Crew:
    """Three workers, one of which is killed or frozen again and again, and replaced."""

    def __init__(self, home: Path, database_url: str, seed: int, *, fencing: bool = True) -> None:
        self.environment = {
            "SDP_HOME": str(home),
            "SDP_DATABASE_URL": database_url,
            "SDP_STORAGE_URL": f"file://{home / 'storage'}",
            "SDP_LEASE_TTL_S": str(LEASE_TTL_S),
            "SDP_ENGINE__FAKE_SECONDS_PER_BATCH": "0.1",
        }
        self.random = random.Random(seed)
        self.fencing = fencing
        self.kills = self.freezes = 0
        self.crashes: list[str] = []
        self.frozen: dict[int, float] = {}
        self.workers = [self._start() for _ in range(WORKERS)]

    def _start(self) -> ForkServerProcess:
        return worker_process.start(self.environment, fencing=self.fencing)

    def torment(self, seconds: float, *, kill_share: float = 0.5) -> None:
        """Kill or freeze somebody about twice a second."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            time.sleep(self.random.uniform(0.2, 0.8))
            self._thaw()
            victim = self.random.choice(self.workers)
            pid = victim.pid
            if pid is None or pid in self.frozen or not victim.is_alive():
                self._replace()
            elif self.random.random() < kill_share:
                os.kill(pid, signal.SIGKILL)
                self.kills += 1
                victim.join()
            else:
                os.kill(pid, signal.SIGSTOP)
                self.frozen[pid] = time.monotonic() + LEASE_TTL_S * self.random.uniform(1.3, 2.0)
                self.freezes += 1
        while self.frozen:
            time.sleep(0.05)
            self._thaw()

    def finish(self, database: Database) -> None:
        """Let whoever is left work to the end."""
        ends = time.monotonic() + PATIENCE_S
        while set(statuses(database)) - set(map(str, TERMINAL)):
            assert time.monotonic() < ends, Counter(statuses(database))
            self._replace()
            time.sleep(0.2)
        self.stop()

    def stop(self) -> None:
        """End all, frozen ones too."""
        for pid in self.frozen:
            os.kill(pid, signal.SIGCONT)
        for worker in self.workers:
            worker.join(LEASE_TTL_S * 10)
            worker.kill()
            worker.join()
            self._note(worker)

    def _thaw(self) -> None:
        for pid, until in list(self.frozen.items()):
            if time.monotonic() >= until:
                os.kill(pid, signal.SIGCONT)
                del self.frozen[pid]

    def _replace(self) -> None:
        for place, worker in enumerate(self.workers):
            if not worker.is_alive():
                self._note(worker)
                self.workers[place] = self._start()

    def _note(self, worker: ForkServerProcess) -> None:
        if worker.exitcode not in (0, -signal.SIGKILL):
            log = Path(self.environment["SDP_HOME"]) / f"worker-{worker.pid}.log"
            self.crashes.append(f"worker {worker.pid} left with {worker.exitcode}: {log.read_text()[-2000:]}")


def violations(database: Database, store: LocalStore, home: Path) -> list[str]:
    """What must never be, whatever died."""
    own = (image.c.job_id == job.c.id) & (image.c.fingerprint == job.c.fingerprint)
    with database.read() as connection:
        pictures = select(job.c.id, job.c.status, job.c.attempt, image.c.key).outerjoin(image, own)
        rows = connection.execute(pictures).all()
        told = Counter(
            (event["subject"], event["fingerprint"]) for event in events(database) if event["event"] == "job.succeeded"
        )
    found = [f"job {row.id} is {row.status}" for row in rows if row.status != "succeeded"]
    found += [f"job {row.id} has no picture" for row in rows if row.key is None]
    found += [f"job {row.id} made {row.attempt} attempts" for row in rows if not 1 <= row.attempt <= MAX_ATTEMPTS]
    found += [f"{subject} succeeded {count} times" for (subject, _), count in told.items() if count != 1]
    if len(told) != len(rows):
        found.append(f"{len(told)} of {len(rows)} jobs succeeded in the audit log")
    key = load_key(home / "seal.pem", create=True)
    seal(database, store, key)
    found += [f"{fault.kind} {fault.subject}: {fault.detail}" for fault in verify(database, store, key).faults]
    return found


def run_campaign(
    audit: AuditLog, database_url: str, home: Path, *, seed: int, fencing: bool = True, seconds: float = CHAOS_S
) -> tuple[Crew, list[str]]:
    """Torment a crew in the middle of a campaign, then let it finish; returns what was violated."""
    # The second campaign asks for the pictures of the first: some are copied, some are made twice, all are there.
    for name in ("spring", "autumn"):
        published(audit, chains(int(30 * seconds), "draft", "scene"), name=name, max_attempts=MAX_ATTEMPTS)
    crew = Crew(home, database_url, seed, fencing=fencing)
    try:
        # A kill hides what a worker would have done after its lease was lost; a freeze shows it.
        crew.torment(seconds, kill_share=0.5 if fencing else 0.0)
        crew.finish(audit.database)
    finally:
        crew.stop()
    return crew, violations(audit.database, LocalStore(home / "storage"), home)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost_and_nothing_made_twice(
    audit: AuditLog, database: Database, database_url: str, tmp_path: Path, seed: int
) -> None:
    crew, found = run_campaign(audit, database_url, tmp_path, seed=seed)
    print(f"{database.writer.dialect.name}, seed {seed}: {crew.kills} kills, {crew.freezes} freezes in {CHAOS_S} s")
    assert found == []
    assert crew.crashes == []
    assert crew.kills + crew.freezes >= CHAOS_S / 2


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_the_suite_catches_a_queue_without_fencing(audit: AuditLog, database_url: str, tmp_path: Path) -> None:
    crew, found = run_campaign(audit, database_url, tmp_path, seed=1, fencing=False, seconds=3.0)
    print("without fencing:", *(found + crew.crashes)[:5], sep="\n  ")
    assert found + crew.crashes, f"nobody noticed after {crew.freezes} freezes"
