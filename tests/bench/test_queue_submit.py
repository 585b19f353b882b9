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
from sdpipeline.db import staging
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database, open_database
from sdpipeline.db.migrate import upgrade
from sdpipeline.db.submit import submit
from sdpipeline.db.tables import job, job_parent
from sdpipeline.storage import LocalStore
from tests.factories import campaign_of, input_folder

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1200)]

JOBS = 100_000
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


def measured(database: Database, tmp_path: Path, source: str) -> dict[str, float]:
    """Seconds of the whole submit, and of the database's half from ready jobs into another campaign."""
    audit, store, inputs = AuditLog(database, actor="bench"), LocalStore(tmp_path / "store"), input_folder(tmp_path)
    campaign = campaign_of(source, tmp_path)
    specs = list(expand.expand(campaign_of(source.replace("spring", "autumn"), tmp_path), inputs))
    assert len(specs) == JOBS

    def publish() -> None:
        with staging.prepared(specs) as ready, audit.transaction() as tx:
            submit(tx, ready, team="t", name="autumn", source=source, priority=1, max_attempts=3)

    found = {"expansion": seconds(lambda: list(expand.expand(campaign, inputs)))}
    found["whole submit"] = seconds(lambda: submission.submit(campaign, inputs, audit, store, team="t", max_attempts=3))
    found["again, unchanged"] = seconds(
        lambda: submission.submit(campaign, inputs, audit, store, team="t", max_attempts=3)
    )
    with database.write() as connection:
        database.is_sqlite or connection.execute(text("TRUNCATE job, job_parent, attempt, image"))
    found["database's half"] = seconds(publish)
    return found


@pytest.mark.parametrize("source", [ALONE, CHAINS], ids=["one stage", "chains of two"])
def test_a_submit_takes_at_most_three_bare_copies(postgres_url: str, tmp_path: Path, source: str) -> None:
    database = open_database(postgres_url)
    upgrade(database)
    found = measured(database, tmp_path, source)
    bare, checked = bare_copy(database, checked=False), bare_copy(database, checked=True)
    for name, took in found.items():
        print(
            f"{name:18} {took:6.2f} s, x{took / checked:.2f} of a COPY, x{took / bare:.2f} of one without foreign keys"
        )
    print(f"COPY {checked:.2f} s, {bare:.2f} s without foreign keys")
    database.close()
    assert found["whole submit"] <= 3 * checked


def test_what_a_submit_takes_on_sqlite(tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{tmp_path / 'queue.db'}")
    upgrade(database)
    for name, took in measured(database, tmp_path, CHAINS).items():
        print(f"{name:18} {took:6.2f} s, {JOBS / took:,.0f} jobs/s")
    database.close()
