"""Local worker processes that are killed and frozen at random, and replaced."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil

from sdpipeline.db.connection import Database
from sdpipeline.domain import TERMINAL
from sdpipeline.worker.delivery_process import EXIT_GRACE_S, MIN_SILENCE_S, SERVER
from tests.chaos import worker_process
from tests.factories import statuses
from tests.integration.certificates import signing_settings

WORKERS = 3
LEASE_TTL_S = 1.0
MAX_ATTEMPTS = 20
PATIENCE_S = 300.0
DELIVERY_SHARE = 0.6
DELIVERY_TICK_S = (0.5, 3.5)
TICK_S = (0.2, 0.8)


class ChaosWorkers:
    """Worker processes in ``home`` with random faults; ``settings`` are the environment of each.

    With ``outages``, database and storage may be unavailable when a worker starts or stops; it exits then and is
    replaced. With ``delivery``, each worker has a real delivery process, which is killed and frozen alone too.
    """

    def __init__(
        self,
        home: Path,
        database_url: str,
        seed: int,
        *,
        workers: int = WORKERS,
        fencing: bool = True,
        outages: bool = False,
        delivery: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.environment = (
            signing_settings(home)
            | {
                "SDP_HOME": str(home),
                "SDP_DATABASE_URL": database_url,
                "SDP_STORAGE_URL": f"file://{home / 'storage'}",
                "SDP_LEASE_TTL_S": str(LEASE_TTL_S),
                "SDP_ENGINE__FAKE_SECONDS_PER_BATCH": "0.1",
            }
            | dict(settings or {})
        )
        self.home = home
        self.random = random.Random(seed)
        self.fencing = fencing
        self.delivery = delivery
        self.good_ends = {0, -signal.SIGKILL} | ({os.EX_TEMPFAIL} if outages or delivery else set())
        self.kills = self.freezes = self.delivery_kills = self.delivery_freezes = 0
        self.crashes: list[str] = []
        self.frozen: dict[int, float] = {}
        self.workers = [self._start() for _ in range(workers)]

    @property
    def fenced(self) -> int:
        """Number of finished pictures that the database refused because their lease was lost meanwhile."""
        return sum(log.read_text().count("lease_lost") for log in self.home.glob("worker-*.log"))

    def inject_faults(
        self, seconds: float, *, kill_share: float = 0.5, tick_s: tuple[float, float] | None = None
    ) -> None:
        """Kill or freeze a process about twice a second, or less often if delivery processes have to start."""
        tick_s = tick_s or (DELIVERY_TICK_S if self.delivery else TICK_S)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            time.sleep(self.random.uniform(*tick_s))
            self._resume_frozen()
            self._replace()
            running = [worker for worker in self.workers if worker.is_alive() and worker.pid not in self.frozen]
            kill = self.random.random() < kill_share
            if self.delivery and self.random.random() < DELIVERY_SHARE:
                self._hit_delivery(kill=kill)
            elif running:
                self._hit_worker(self.random.choice(running), kill=kill)
        while self.frozen:
            time.sleep(0.05)
            self._resume_frozen()

    def finish(self, database: Database) -> None:
        """Replace dead workers until all jobs are finished."""
        ends = time.monotonic() + PATIENCE_S
        while set(statuses(database)) - set(map(str, TERMINAL)):
            assert time.monotonic() < ends, f"{Counter(statuses(database))} {self.crashes}"
            self._replace()
            time.sleep(0.2)
        self.stop()

    def stop(self) -> None:
        """Stop all workers, including frozen ones."""
        for pid in self.frozen:
            _send(pid, signal.SIGCONT)
        for worker in self.workers:
            worker.join(LEASE_TTL_S * 10)
            worker.kill()
            worker.join()
            self._note(worker)

    def _start(self) -> ForkServerProcess:
        return worker_process.start(self.environment, fencing=self.fencing, delivery=self.delivery)

    def delivery_processes(self) -> list[psutil.Process]:
        """Return the delivery processes of this home, including those that outlived their worker."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            if SERVER in (process.info["cmdline"] or ()) and process.info["status"] != psutil.STATUS_ZOMBIE:
                with suppress(psutil.NoSuchProcess):
                    found += [process] if process.environ().get("SDP_HOME") == str(self.home) else []
        return found

    def surviving_delivery_processes(self) -> list[int]:
        """Return the delivery processes that outlived their workers, after a short wait."""
        ends = time.monotonic() + EXIT_GRACE_S + 1.0
        while (found := self.delivery_processes()) and time.monotonic() < ends:
            time.sleep(0.1)
        return [process.pid for process in found]

    def _hit_delivery(self, *, kill: bool) -> None:
        running = [process for process in self.delivery_processes() if process.pid not in self.frozen]
        if not running:
            return
        victim = self.random.choice(running).pid
        if not _send(victim, signal.SIGKILL if kill else signal.SIGSTOP):
            return
        if kill:
            self.delivery_kills += 1
        else:
            self.delivery_freezes += 1
            # Some workers are replaced before that; the others continue and are fenced.
            self.frozen[victim] = time.monotonic() + self.random.uniform(1.3 * LEASE_TTL_S, 2 * MIN_SILENCE_S)

    def _hit_worker(self, victim: ForkServerProcess, *, kill: bool) -> None:
        assert victim.pid is not None
        if not _send(victim.pid, signal.SIGKILL if kill else signal.SIGSTOP):
            return
        if kill:
            self.kills += 1
            victim.join()
        else:
            self.freezes += 1
            self.frozen[victim.pid] = time.monotonic() + LEASE_TTL_S * self.random.uniform(1.3, 2.0)

    def _resume_frozen(self) -> None:
        for pid, until in list(self.frozen.items()):
            if time.monotonic() >= until:
                _send(pid, signal.SIGCONT)
                del self.frozen[pid]

    def _replace(self) -> None:
        for n, worker in enumerate(self.workers):
            if not worker.is_alive():
                self._note(worker)
                self.workers[n] = self._start()

    def _note(self, worker: ForkServerProcess) -> None:
        if worker.exitcode not in self.good_ends:
            log = self.home / f"worker-{worker.pid}.log"
            self.crashes.append(f"worker {worker.pid} left with {worker.exitcode}: {log.read_text()[-2000:]}")


def _send(pid: int, sent: signal.Signals) -> bool:
    """Send a signal; return False if the process has just ended by itself."""
    try:
        os.kill(pid, sent)
    except ProcessLookupError:
        return False
    return True
