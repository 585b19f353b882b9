"""Submitting 100,000 jobs: on PostgreSQL against a bare COPY of the same rows in the same run; on SQLite the figure."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Table, text

from sdpipeline import expand, submission
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database, open_database
from sdpipeline.db.migrate import upgrade
from sdpipeline.db.tables import job, job_parent
from sdpipeline.storage import LocalStore
from tests.factories import campaign_of, input_folder

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1200)]

JOBS = 100_000
ROUNDS = 3
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
    """COPY of the very rows a submit wrote into empty twins of its tables; ``checked`` with their foreign keys."""
    took = 0.0
    for table in (job, job_parent):
        with database.write() as connection:
            rows = [_as_driver_takes(table, row) for row in connection.execute(table.select()).all()]
            connection.execute(text(f"CREATE TABLE bare_{table.name} (LIKE {table.name} INCLUDING ALL)"))
            for number, key in enumerate(table.foreign_keys if checked else ()):
                connection.execute(
                    text(
                        f"ALTER TABLE bare_{table.name} ADD CONSTRAINT bare_{table.name}_{number}"
                        f" FOREIGN KEY ({key.parent.name}) REFERENCES {key.column.table.name} (id)"
                    )
                )
        took += seconds(lambda table=table, rows=rows: _copy(database, table, rows))  # type: ignore[misc]
        with database.write() as connection:
            connection.execute(text(f"DROP TABLE bare_{table.name}"))
    return took


def _as_driver_takes(table: Table, row: Any) -> tuple[Any, ...]:
    return tuple(json.dumps(value) if isinstance(value, dict) else value for value in row)


def _copy(database: Database, table: Table, rows: list[tuple[Any, ...]]) -> None:
    with database.write() as connection:
        driver: Any = connection.connection.dbapi_connection
        with driver.cursor().copy(f"COPY bare_{table.name} FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)


def submits(database: Database, tmp_path: Path, source: str, name: str) -> dict[str, float]:
    """Seconds of the whole submit of a new campaign, of the same again, and of what expanding it takes of each."""
    audit, store, inputs = AuditLog(database, actor="bench"), LocalStore(tmp_path / "store"), input_folder(tmp_path)
    campaign = campaign_of(source.replace("spring", name), tmp_path)

    def publish() -> None:
        submission.submit(campaign, inputs, audit, store, team="t", max_attempts=3)

    expansion = seconds(lambda: sum(1 for _ in expand.expand(campaign, inputs)))
    return {"expansion alone": expansion, "submit": seconds(publish), "again, unchanged": seconds(publish)}


def emptied(database: Database) -> None:
    """No round finds larger indexes than the one before."""
    with database.write() as connection:
        connection.execute(text("TRUNCATE job, job_parent, attempt, image"))


@pytest.mark.parametrize("source", [ALONE, CHAINS], ids=["one stage", "chains of two"])
def test_a_submit_takes_at_most_three_bare_copies(postgres_url: str, tmp_path: Path, source: str) -> None:
    database = open_database(postgres_url)
    upgrade(database)
    rounds: list[dict[str, float]] = []
    for number in range(ROUNDS):
        found = submits(database, tmp_path, source, f"spring-{number}")
        found["COPY"] = bare_copy(database, checked=True)
        found["COPY without foreign keys"] = bare_copy(database, checked=False)
        rounds.append(found)
        emptied(database)
    # Others' work on the machine only ever adds.
    least = {name: min(found[name] for found in rounds) for name in rounds[0]}
    for name, took in least.items():
        print(f"{name:26} {took:6.2f} s, x{took / least['COPY']:.2f}")
    database.close()
    assert least["submit"] <= 3 * least["COPY"]


def test_what_a_submit_takes_on_sqlite(tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{tmp_path / 'queue.db'}")
    upgrade(database)
    for name, took in submits(database, tmp_path, CHAINS, "spring").items():
        print(f"{name:26} {took:6.2f} s, {JOBS / took:,.0f} jobs/s")
    database.close()
