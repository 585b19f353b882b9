"""Fault injection that uses only the command line, with a count of rows, objects and processes afterwards.

Workers and their delivery processes are killed and frozen, PostgreSQL is crashed, and campaigns are cancelled, changed,
paused and resumed.

It shares nothing with the other chaos tests: it starts ``sdpipeline worker`` as a user would and reads the database
with plain SQL. Run it by name, as it takes minutes::

    python -m tests.chaos.black_box --seeds 5 --seconds 60
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import psutil
import psycopg

from tests.chaos.postgres import PostgresServer, postgres_server
from tests.integration.certificates import signing_settings

LEASE_TTL_S = 3.0
WORKERS = 3
QUIET_TIMEOUT_S = 600.0
OVER = ("succeeded", "failed", "blocked", "skipped", "cancelled")
CAMPAIGN = """\
name: {name}
checkpoint: shapes
variables: {{colour: [red, green, blue, yellow]}}
seeds: {{start: {start}, count: {count}}}
defaults: {{width: 64, height: 64, num_inference_steps: {steps}}}
stages:
  - {{id: draft, task: text-to-image, prompt: "a {{{{ colour }}}} circle"}}
  - {{id: final, task: image-to-image, prompt: "a {{{{ colour }}}} square", image: {{stage: draft}}, strength: 0.5}}
"""


@dataclass(slots=True)
class Deployment:
    """One home with its settings; ``postgres`` is None on SQLite."""

    home: Path
    settings: dict[str, str]
    postgres: PostgresServer | None
    acts: Counter[str] = field(default_factory=Counter)

    def command(self, *words: object, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run one command and wait for its end."""
        line = [sys.executable, "-m", "sdpipeline", *map(str, words), "--home", str(self.home)]
        return subprocess.run(line, env=self.settings, capture_output=True, text=True, timeout=300, check=check)

    def worker(self) -> subprocess.Popen[bytes]:
        """Start one worker process that writes its output to a log file."""
        with (self.home / "workers.log").open("ab") as log:
            line = [sys.executable, "-m", "sdpipeline", "worker", "--home", str(self.home)]
            return subprocess.Popen(line, env=self.settings, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def rows(self, statement: str) -> list[tuple[Any, ...]]:
        """Read with plain SQL, without the package's own code."""
        if self.postgres is None:
            with sqlite3.connect(self.home / "sdpipeline.db", timeout=60) as reader:
                return reader.execute(statement).fetchall()
        with psycopg.connect(self.settings["SDP_DATABASE_URL"]) as connection:
            return connection.execute(statement.encode()).fetchall()


@contextmanager
def deployment(folder: Path, *, on_postgres: bool) -> Iterator[Deployment]:
    """A home on SQLite, or on a PostgreSQL server of its own."""
    home = folder / "home"
    home.mkdir(parents=True)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SDP_", "PREFECT_"))}
    own |= {"SDP_LEASE_TTL_S": str(LEASE_TTL_S), "SDP_ENGINE__FAKE_SECONDS_PER_BATCH": "0.3", "SDP_MAX_ATTEMPTS": "20"}
    own |= {"SDP_ENGINE__MAX_BATCH": "4", "HF_HUB_OFFLINE": "1"}
    with ExitStack() as stack:
        server = stack.enter_context(postgres_server()) if on_postgres else None
        if server is not None:
            url = server.new_database("faults").replace("+psycopg", "")
            seal_key = home / "seal.pem"
            subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(seal_key)], check=True)
            own |= signing_settings(home) | {"SDP_SIGNING__SEAL_KEY_FILE": str(seal_key)}
            own |= {"SDP_DATABASE_URL": url, "SDP_STORAGE_URL": f"file://{home / 'storage'}"}
        yield Deployment(home, own, server)


class FaultRun:
    """Random faults, and workers that are replaced when they exit."""

    def __init__(self, at: Deployment, seed: int) -> None:
        self.at = at
        self.chance = random.Random(seed)
        self.workers = [at.worker() for _ in range(WORKERS)]
        self.frozen: dict[int, float] = {}
        self.campaigns: dict[str, int] = {}

    def inject_faults(self, seconds: float) -> None:
        """Perform about one random action per second."""
        ends = time.monotonic() + seconds
        acts: Sequence[tuple[Callable[[], None], int]] = (
            (self.kill_worker, 6),
            (self.freeze_worker, 3),
            (self.kill_delivery, 6),
            (self.freeze_delivery, 6),
            (self.submit, 3),
            (self.change, 2),
            (self.cancel, 1),
            (self.pause_and_resume, 1),
            (self.crash_database, 1 if self.at.postgres else 0),
        )
        self.submit()
        while time.monotonic() < ends:
            act = self.chance.choices([act for act, _ in acts], [weight for _, weight in acts])[0]
            act()
            self.at.acts[act.__name__] += 1
            time.sleep(self.chance.uniform(0.3, 1.2))
            self.tidy()

    def tidy(self) -> None:
        """Wake processes that were frozen long enough, and replace workers that exited."""
        for pid, until in list(self.frozen.items()):
            if time.monotonic() >= until:
                _send(pid, signal.SIGCONT)
                del self.frozen[pid]
        for place, worker in enumerate(self.workers):
            if worker.poll() is not None:
                self.at.acts[f"worker ended with {worker.returncode}"] += 1
                self.workers[place] = self.at.worker()

    def kill_worker(self) -> None:
        self.chance.choice(self.workers).kill()

    def freeze_worker(self) -> None:
        self._freeze(self.chance.choice(self.workers).pid)

    def kill_delivery(self) -> None:
        for child in self._deliveries():
            _send(child.pid, signal.SIGKILL)
            return

    def freeze_delivery(self) -> None:
        for child in self._deliveries():
            self._freeze(child.pid)
            return

    def submit(self) -> None:
        """Submit a new campaign, unless enough jobs are left."""
        if len(self._open()) < 2:
            name = f"run-{len(self.campaigns)}"
            self.campaigns[name] = 2
            self._submit(name)

    def change(self) -> None:
        """Submit the same campaign with other steps: its unfinished jobs are replaced."""
        for name in self._open()[:1]:
            self.campaigns[name] += 1
            self._submit(name, "--prune")

    def cancel(self) -> None:
        """Cancel what is left of a campaign, then retry it."""
        for name in self._open()[:1]:
            self.at.command("cancel", name)
            self.at.command("retry", name, "--status", "cancelled")

    def pause_and_resume(self) -> None:
        for name in self._open()[:1]:
            self.at.command("pause", name)
            time.sleep(self.chance.uniform(0.5, 2.0))
            self.at.command("resume", name)

    def crash_database(self) -> None:
        if self.at.postgres is not None:
            self.at.postgres.crash_for(self.chance.uniform(0.5, 4.0))

    def finish(self) -> None:
        """Wait until every job is over, then end all workers."""
        for pid in self.frozen:
            _send(pid, signal.SIGCONT)
        self.frozen.clear()
        for name, steps in self.campaigns.items():  # repeats what a database crash may have kept from being recorded
            del steps
            self.at.command("resume", name)
            self._submit(name, "--prune")
            self.at.command("retry", name, "--status", "cancelled")
        ends = time.monotonic() + QUIET_TIMEOUT_S
        while self._open() and time.monotonic() < ends:
            self.tidy()
            time.sleep(0.5)
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            try:
                worker.wait(40)
            except subprocess.TimeoutExpired:
                worker.kill()
                self.at.acts["worker that did not end"] += 1

    def _submit(self, name: str, *options: str) -> None:
        text = CAMPAIGN.format(name=name, start=len(name), count=4, steps=self.campaigns[name])
        file = self.at.home / f"{name}.yaml"
        file.write_text(text, encoding="utf-8")
        self.at.command("submit", file, *options)

    def _open(self) -> list[str]:
        listed = ", ".join(f"'{status}'" for status in OVER)
        statement = (
            "SELECT DISTINCT c.name FROM campaign c JOIN job j ON j.campaign_id = c.id "
            f"WHERE j.status NOT IN ({listed}) ORDER BY 1"
        )
        with suppress(psycopg.Error, sqlite3.Error):
            return [str(name) for (name,) in self.at.rows(statement)]
        return list(self.campaigns)

    def _deliveries(self) -> list[psutil.Process]:
        found = []
        for worker in self.workers:
            with suppress(psutil.NoSuchProcess):
                found += psutil.Process(worker.pid).children(recursive=True)
        self.chance.shuffle(found)
        return found

    def _freeze(self, pid: int) -> None:
        if _send(pid, signal.SIGSTOP):
            self.frozen[pid] = time.monotonic() + LEASE_TTL_S * self.chance.uniform(0.5, 3.0)


def violations(at: Deployment) -> Iterator[str]:
    """Every violated invariant after all processes have ended."""
    for status, count in at.rows("SELECT status, count(*) FROM job GROUP BY status"):
        if status not in {"succeeded", "cancelled"}:
            yield f"{count} jobs are {status}"
    twice = at.rows(
        "SELECT j.id, count(i.job_id) FROM job j "
        "LEFT JOIN image i ON i.job_id = j.id AND i.fingerprint = j.fingerprint "
        "WHERE j.status = 'succeeded' GROUP BY j.id HAVING count(i.job_id) <> 1"
    )
    yield from (f"job {job} has {count} pictures" for job, count in twice)
    held = at.rows("SELECT id FROM job WHERE lease_id IS NOT NULL AND status <> 'leased'")
    yield from (f"job {job} is over and still leased" for (job,) in held)
    for (count,) in at.rows("SELECT count(*) FROM attempt WHERE finished_at IS NULL"):
        if count:
            yield f"{count} attempts are open"
    counts: Counter[tuple[str, str]] = Counter()
    for (body,) in at.rows("SELECT body FROM audit_event"):
        event = json.loads(body)
        if event["event"] == "job.succeeded":
            counts[event["subject"], event["fingerprint"]] += 1
    yield from (f"{job} succeeded {count} times in the audit log" for (job, _), count in counts.items() if count > 1)
    yield from _objects(at)
    audit = at.command("audit", "verify", "--full", "--json")
    faults = json.loads(audit.stdout or "{}").get("faults", [{"kind": "unreadable", "detail": audit.stderr[-500:]}])
    yield from (f"audit verify: {fault}" for fault in faults)


def _objects(at: Deployment) -> Iterator[str]:
    for campaign in at.rows("SELECT name FROM campaign"):
        jobs = json.loads(at.command("jobs", campaign[0], "--json").stdout)["jobs"]
        for job in jobs:
            if job["status"] == "succeeded":
                path = Path(unquote(urlsplit(job["image"]["url"]).path))
                if not path.is_file():
                    yield f"job {job['id']}: its picture is not in storage"
                elif hashlib.sha256(path.read_bytes()).hexdigest() != job["image"]["sha256"]:
                    yield f"job {job['id']}: its picture is not the recorded one"


def left_over(at: Deployment) -> list[str]:
    """Processes of this home that are still running."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        line = " ".join(process.info["cmdline"] or ())
        if "sdpipeline" in line and (process.info["environ"] or {}).get("STORM_HOME") == str(at.home):
            found.append(line)
    return found


def _send(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def run_seed(seed: int, seconds: float) -> list[str]:
    """Run one seed and return the violations."""
    with (
        tempfile.TemporaryDirectory(prefix="run-") as folder,
        deployment(Path(folder), on_postgres=seed % 2 == 1) as at,
    ):
        at.settings["STORM_HOME"] = str(at.home)
        started = time.monotonic()
        if at.postgres is None:
            print(at.command("db", "upgrade").stderr, end="", flush=True)
        run = FaultRun(at, seed)
        try:
            run.inject_faults(seconds)
            run.finish()
            wrong = [*violations(at), *(f"still running: {line}" for line in left_over(at))]
        finally:
            for worker in run.workers:
                worker.kill()
        made = at.rows("SELECT count(*) FROM image")[0][0]
        backend = "PostgreSQL" if at.postgres else "SQLite"
        print(f"seed {seed} on {backend}: {made} pictures in {time.monotonic() - started:.0f} s; {dict(at.acts)}")
        if wrong:
            (kept := Path(tempfile.mkdtemp(prefix="run-log-")) / "workers.log").write_bytes(
                (at.home / "workers.log").read_bytes()
            )
            print(f"  {len(wrong)} violations, workers' log in {kept}:", *wrong[:20], sep="\n  ")
        return wrong


def main() -> None:
    """Run all seeds; exit with 1 if any of them found a violation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0)
    chosen = parser.parse_args()
    wrong = [run_seed(seed, chosen.seconds) for seed in range(chosen.first, chosen.first + chosen.seeds)]
    print(f"{chosen.seeds} seeds, {sum(map(len, wrong))} violations")
    sys.exit(any(wrong))


if __name__ == "__main__":
    main()
