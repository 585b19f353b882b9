"""Submitting 100,000 jobs: on PostgreSQL compared with a bare COPY of the same rows; on SQLite without comparison.

``SDP_TEST_BENCH_JOBS=1000000`` submits that many.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Table, text

from sdpipeline.campaigns import expand, submission
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database, open_database
from sdpipeline.db.migrate import upgrade
from sdpipeline.db.tables import job, job_parent
from sdpipeline.storage import LocalStore
from tests.factories import campaign_of, input_folder
from tests.integration.processes import processes

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1200)]

JOBS = int(os.environ.get("SDP_TEST_BENCH_JOBS", "100000"))
ROUNDS = 3 if JOBS <= 100_000 else 1
CHUNK = 10_000
MAX_MIB = 500
CHAINS = f"""
    name: spring
    checkpoint: shapes
    variables: {{colour: [red, green, blue, yellow]}}
    seeds: {{start: 0, count: {JOBS // 8}}}
    defaults: {{width: 128, height: 128, num_inference_steps: 20, guidance_scale: 4.0}}
    stages:
      - {{id: draft, task: text-to-image, prompt: "a {{{{ colour }}}} circle on a white background"}}
      - {{id: final, task: image-to-image, prompt: "a {{{{ colour }}}} circle", image: {{stage: draft}}, strength: 0.5}}
"""
ALONE = CHAINS.replace(f"count: {JOBS // 8}", f"count: {JOBS // 4}").rsplit("\n      - ", 1)[0] + "\n"


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def bare_copy(database: Database, *, checked: bool) -> float:
    """COPY of the rows that a submit wrote, into empty copies of its tables; ``checked`` keeps their foreign keys."""
    took = 0.0
    for table in (job, job_parent):
        with database.write() as connection:
            connection.execute(text(f"CREATE TABLE bare_{table.name} (LIKE {table.name} INCLUDING ALL)"))
            for number, key in enumerate(table.foreign_keys if checked else ()):
                connection.execute(
                    text(
                        f"ALTER TABLE bare_{table.name} ADD CONSTRAINT bare_{table.name}_{number}"
                        f" FOREIGN KEY ({key.parent.name}) REFERENCES {key.column.table.name} (id)"
                    )
                )
        took += _copy(database, table)
        with database.write() as connection:
            connection.execute(text(f"DROP TABLE bare_{table.name}"))
    return took


def _copy(database: Database, table: Table) -> float:
    """Seconds of one COPY and its commit, without reading the rows."""
    took = 0.0
    with database.read() as source:
        chunks = _chunks(source, table)
        started = time.perf_counter()
        with database.write() as connection:
            driver: Any = connection.connection.dbapi_connection
            # By name: a migration appended columns that are declared further up here.
            names = ", ".join(table.columns.keys())
            with driver.cursor().copy(f"COPY bare_{table.name} ({names}) FROM STDIN") as copy:
                took += time.perf_counter() - started
                for rows in chunks:
                    started = time.perf_counter()
                    for row in rows:
                        copy.write_row(row)
                    took += time.perf_counter() - started
                started = time.perf_counter()
    return took + time.perf_counter() - started


def _chunks(connection: Connection, table: Table) -> Iterator[list[tuple[Any, ...]]]:
    rows = connection.execute(table.select().execution_options(yield_per=CHUNK))
    for chunk in rows.partitions():
        yield [tuple(json.dumps(value) if isinstance(value, dict) else value for value in row) for row in chunk]


def submits(url: str, tmp_path: Path, source: str, name: str) -> dict[str, float]:
    """Seconds of submitting a new campaign and of submitting it again, how much of each is expansion, and the peak
    memory of a separate process that does both."""
    answers: Any = processes.SimpleQueue()
    child = processes.Process(target=_submits, args=(answers, url, tmp_path, source, name))
    child.start()
    found: dict[str, float] = answers.get()
    child.join()
    return found


def _submits(answers: Any, url: str, tmp_path: Path, source: str, name: str) -> None:
    database = open_database(url)
    audit, store, inputs = AuditLog(database, actor="bench"), LocalStore(tmp_path / "store"), input_folder(tmp_path)
    campaign = campaign_of(source.replace("spring", name), tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    added = []

    def publish() -> None:
        added.append(submission.submit(campaign, inputs, audit, store, team="t", max_attempts=3).added)

    def plan() -> None:
        submission.plan(campaign, inputs, database, submission.Planning(team="t", max_batch=8))

    expansion = seconds(lambda: sum(1 for _ in expand.expand(campaign, inputs)))
    found = {"expansion alone": expansion, "plan, all new": seconds(plan), "submit": seconds(publish)}
    found |= {"again, unchanged": seconds(publish), "plan, unchanged": seconds(plan)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answers.put(found | {"added again": added[1], "peak MiB": peak / 1024, "MiB before": before / 1024})
    database.close()


def emptied(database: Database) -> None:
    """Tables emptied, so that each round starts with indexes of the same size."""
    with database.write() as connection:
        connection.execute(text("TRUNCATE job, job_parent, attempt, image"))


@pytest.mark.parametrize("source", [ALONE, CHAINS], ids=["one stage", "chains of two"])
def test_a_submit_takes_at_most_three_bare_copies(postgres_url: str, tmp_path: Path, source: str) -> None:
    database = open_database(postgres_url)
    upgrade(database)
    rounds: list[dict[str, float]] = []
    for number in range(ROUNDS):
        found = submits(postgres_url, tmp_path, source, f"spring-{number}")
        print({name: round(value, 2) for name, value in found.items()}, flush=True)
        found["COPY"] = bare_copy(database, checked=True)
        if JOBS <= 100_000:
            found["COPY without foreign keys"] = bare_copy(database, checked=False)
        rounds.append(found)
        emptied(database)
    # The minimum: other load on the machine only adds time.
    least = {name: min(found[name] for found in rounds) for name in rounds[0]}
    about = {name: least.pop(name) for name in ("added again", "peak MiB", "MiB before")}
    for name, took in least.items():
        print(f"{name:26} {took:6.2f} s, x{took / least['COPY']:.2f}")
    print(f"{JOBS:,} jobs: " + ", ".join(f"{name} {value:.0f}" for name, value in about.items()))
    database.close()
    assert about["added again"] == 0
    assert about["peak MiB"] < MAX_MIB
    assert least["submit"] <= 3 * least["COPY"]


def test_what_a_submit_takes_on_sqlite(tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{tmp_path / 'queue.db'}")
    upgrade(database)
    database.close()
    for name, took in submits(f"sqlite:///{tmp_path / 'queue.db'}", tmp_path, CHAINS, "spring").items():
        print(f"{name:26} {took:8.2f}" + (f" s, {JOBS / took:,.0f} jobs/s" if name[0] in "esp" and took else ""))
