"""Soak test: all faults together, five seeds on each kind of deployment. ``make soak`` writes SOAK.md.

The file does not match pytest's pattern, so that it runs only by name: it takes ten times ``SDP_TEST_SOAK_S`` seconds.
"""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import psutil
import pytest

from sdpipeline.audit import load_key
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import open_database
from sdpipeline.db.migrate import upgrade
from sdpipeline.storage import LocalStore, ObjectStore
from tests.chaos.disk import Disk, small_disk
from tests.chaos.faults import operator_actions, random_faults, reopen_all, repeatedly, s3_settings, submit_more
from tests.chaos.invariants import orphans, violations
from tests.chaos.local_workers import ChaosWorkers
from tests.chaos.postgres import PostgresServer
from tests.factories import statuses
from tests.integration.commands import FAKE_ENGINE
from tests.integration.conftest import Bucket
from tests.integration.fault_proxy import FaultProxy

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(0)]

SOAK_S = float(os.environ.get("SDP_TEST_SOAK_S", "60"))
SEEDS = range(int(os.environ.get("SDP_TEST_SOAK_SEEDS", "5")))
WORKERS = 3
KILL_SHARE = 0.75
MIN_KILLS_A_MINUTE = 10
FAULT_SHARE = 0.03
CHAINS_AT_ONCE = 40
PEOPLE_PAUSE_S = (0.3, 1.5)
OUTAGE_PAUSE_S = (8.0, 12.0)
SLOWER = {FAKE_ENGINE: "0.2"}
"""A slow engine, so that many workers die in the middle of a batch."""
TABLE = Path(os.environ.get("SDP_TEST_SOAK_TABLE", Path(__file__).with_name("SOAK.md")))

Outage = tuple[Callable[[], None], tuple[float, float]]
"""A fault that begins and ends, and the range of seconds between two occurrences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Soaked:
    """One row of the table; its fields are the columns."""

    date: str
    machine: str
    backend: str
    seed: int
    seconds: int
    jobs: int
    done_under_faults: int
    kills: int
    freezes: int
    delivery_kills: int
    delivery_freezes: int
    by_people: int
    database_restarts: int | str
    s3_faults: int | str
    full_disks: int | str
    fenced: int
    wasted_pictures: int
    orphans: int
    violations: int


@pytest.fixture(scope="module")
def table() -> list[Soaked]:
    """The rows of this run."""
    return []


@pytest.mark.parametrize("seed", SEEDS)
def test_sqlite_and_a_directory(home: Path, table: list[Soaked], seed: int) -> None:
    url = f"sqlite:///{home / 'queue.db'}"
    database = open_database(url)
    upgrade(database)
    database.close()
    with small_disk(home / "storage", size_mib=256) as disk:
        full = partial(_full_for, disk, 1.0)
        store = LocalStore(home / "storage")
        soak = Soak(url=url, store=store, home=home, seed=seed, outages=[(full, OUTAGE_PAUSE_S)])
        soak.run(partial(ChaosWorkers, home, url, seed, settings=SLOWER))
        soak.write(table, "SQLite + directory", full_disks=soak.outage_counts[0])
        soak.check()


@pytest.mark.parametrize("seed", SEEDS)
def test_postgresql_and_s3(
    crashing_postgres: PostgresServer, bucket: Bucket, home: Path, table: list[Soaked], seed: int
) -> None:
    url, chance = crashing_postgres.new_database(f"soak_{seed}"), random.Random(seed)
    with FaultProxy(bucket.endpoint_url, random_faults(chance, FAULT_SHARE)) as proxy:
        chaos = partial(ChaosWorkers, home, url, seed, settings=s3_settings(bucket, proxy) | SLOWER)
        crash = partial(crashing_postgres.crash_for, 0.5)
        soak = Soak(url=url, store=bucket.store(), home=home, seed=seed, outages=[(crash, OUTAGE_PAUSE_S)])
        soak.run(chaos, calm=lambda: setattr(proxy, "choose", lambda _method, _path: None))
        faults = sum(fault is not None for _, fault in proxy.seen)
    soak.write(table, "PostgreSQL + S3", database_restarts=soak.outage_counts[0], s3_faults=faults)
    soak.check()


class Soak:
    """One campaign after another under all faults, and a check of what is left at the end."""

    def __init__(self, *, url: str, store: ObjectStore, home: Path, seed: int, outages: Sequence[Outage]) -> None:
        self.database = open_database(url)
        self.store = store
        self.home = home
        self.seed = seed
        self.outages = outages
        self.outage_counts: list[int] = []
        self.seconds = 0.0
        self.done = 0

    def run(self, chaos: Callable[..., ChaosWorkers], calm: Callable[[], object] = lambda: None) -> None:
        """Inject faults, call ``calm`` to end all other faults, and let the workers finish."""
        audit, chance = AuditLog(self.database, actor="user:soak"), random.Random(self.seed)
        submit = submit_more(audit, chains_at_once=CHAINS_AT_ONCE)
        operate = operator_actions(AuditLog(self.database, actor="user:people"), chance, chains_at_once=CHAINS_AT_ONCE)
        submit()
        started = time.monotonic()
        self.chaos = chaos(workers=WORKERS, outages=True, delivery=True)
        try:
            with ExitStack() as stack:
                stack.enter_context(repeatedly(submit, random.Random(self.seed), (0.5, 0.5)))
                by_people = stack.enter_context(repeatedly(operate, chance, PEOPLE_PAUSE_S))
                counts = [
                    stack.enter_context(repeatedly(act, random.Random(self.seed + number), pause_s))
                    for number, (act, pause_s) in enumerate(self.outages, 1)
                ]
                self.chaos.inject_faults(SOAK_S, kill_share=KILL_SHARE)
            self.done = statuses(self.database).count("succeeded")
            calm()
            reopen_all(audit)
            self.chaos.finish(self.database)
        finally:
            self.chaos.stop()
        self.left = self.chaos.surviving_delivery_processes()
        self.by_people = by_people[0]
        self.outage_counts = [count[0] for count in counts]
        self.seconds = time.monotonic() - started
        self.violations = violations(self.database, self.store, load_key(self.home / "seal.pem", create=True))

    def write(self, table: list[Soaked], backend: str, **counts: int) -> None:
        """Write this run's row. The file is rewritten each time, because a run may be interrupted."""
        left = orphans(self.database, self.store)
        line = Soaked(
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
            machine=_machine(),
            backend=backend,
            seed=self.seed,
            seconds=round(self.seconds),
            jobs=len(statuses(self.database)),
            done_under_faults=self.done,
            kills=self.chaos.kills,
            freezes=self.chaos.freezes,
            delivery_kills=self.chaos.delivery_kills,
            delivery_freezes=self.chaos.delivery_freezes,
            by_people=self.by_people,
            fenced=self.chaos.fenced,
            wasted_pictures=left.pictures,
            orphans=left.pictures + left.sidecars,
            violations=len(self.violations),
            **{"database_restarts": "-", "s3_faults": "-", "full_disks": "-"} | counts,
        )
        table.append(line)
        TABLE.write_text(_table(table))

    def check(self) -> None:
        """Check that no invariant was violated, no worker crashed by itself, and every kind of fault occurred often
        enough."""
        self.database.close()
        assert self.violations == []
        assert (self.chaos.crashes, self.left) == ([], [])
        assert self.chaos.kills + self.chaos.delivery_kills >= MIN_KILLS_A_MINUTE * SOAK_S / 60
        assert self.chaos.delivery_freezes
        assert all(self.outage_counts)
        assert self.done, "the faults left no time to make a picture"


def _full_for(disk: Disk, seconds: float) -> None:
    disk.fill()
    time.sleep(seconds)
    disk.free()


def _machine() -> str:
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = found[0].partition(":")[2].strip() if found else platform.machine()
    return f"{os.cpu_count()} cores, {name}, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def _table(lines: Sequence[Soaked]) -> str:
    names = [field.name for field in fields(Soaked)]
    head = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|" + "---|" * len(names)]
    rows = ["| " + " | ".join(str(getattr(line, name)) for name in names) + " |" for line in lines]
    return "\n".join([INTRODUCTION, *head, *rows, ""])


INTRODUCTION = f"""\
# What a soak found

`make soak` wrote this. Each line is one campaign after another for {SOAK_S:.0f} seconds on {WORKERS} workers with
leases of one second, then the rest of the work in peace: workers and their delivery processes killed and frozen beyond
their leases, the database stopped as by a power cut and restarted, {FAULT_SHARE:.0%} of the requests to S3 failing in
any of six ways, the disk full for a second at a time, and people who cancel, retry, change, prune, pause and resume
campaigns (`by people`). `seconds` counts both parts. `fenced` pictures were finished by a worker that had lost its
lease, and were refused; `wasted pictures` are all that were stored and never recorded, `orphans` those and sidecars. A
violation is a job that did not succeed, or has not exactly one picture and one event of its success for each request it
was made for, an attempt that is open although its job is not leased, an object that is missing or altered, or a fault
in chains or seals.
"""
