"""Cost of a lease on the server, in buffers, at depths up to a million ready jobs; prints ratios."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import Connection, event, text

from sdpipeline.db import leasing
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database, open_database
from sdpipeline.db.migrate import upgrade

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1200)]

GROUPS = 24
BATCH = 8
DEPTHS = (1_000, 100_000, 1_000_000)
RARE = GROUPS
"""The last group has one batch; all others share the remaining jobs."""

FILL = """
INSERT INTO campaign (team, name, created_at) VALUES ('default', 'bench', 0);
INSERT INTO campaign_version (campaign_id, number, source, source_sha256, jobs_added, jobs_root, actor, created_at)
VALUES (1, 1, '', '', 0, '', '', 0);
INSERT INTO work_group (campaign_id, stage, depth, batch_key, checkpoint_digest, description)
SELECT 1, 'draft', 0, g, 'digest-' || g, '{}' FROM generate_series(1, :groups) g;
INSERT INTO job (campaign_id, version_id, group_id, stage, depth, row_key, variables, axes, seed, identity,
    fingerprint, request, salt, status, created_at)
SELECT 1, 1, CASE WHEN n > :depth - :batch THEN :groups ELSE 1 + n % (:groups - 1) END, 'draft', 0, n, '{}', '{}', n,
    md5(n::text) || md5('i' || n), md5('f' || n) || md5('g' || n),
    '{"task": "text-to-image", "checkpoint": {"alias": "a", "digest": "d"}, "prompt": "a picture of a thing",
      "seed": 1, "width": 512, "height": 512, "num_inference_steps": 20, "guidance_scale": 4.0, "scheduler": "ddim"}',
    '', 'ready', 0
FROM generate_series(1, :depth) n;
"""


@contextmanager
def filled(postgres_url: str, depth: int) -> Iterator[Database]:
    database = open_database(postgres_url)
    upgrade(database)
    with database.write() as connection:
        for statement in FILL.split(";\n"):
            if statement.strip():
                values = {"groups": GROUPS, "depth": depth, "batch": BATCH}
                used = {name: value for name, value in values.items() if f":{name}" in statement}
                connection.execute(text(statement), used)
    with database.writer.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE")
    try:
        yield database
    finally:
        database.close()


def cost(database: Database, **options: Any) -> tuple[int, float]:
    """Buffers and milliseconds of all statements of one lease, which is rolled back."""
    total = [0, 0.0]

    def explain(conn: Connection, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        driver: Any = conn.connection.dbapi_connection
        if statement.split(maxsplit=1)[0] not in ("SELECT", "WITH", "UPDATE", "INSERT", "DELETE"):
            return
        many = isinstance(parameters, list)
        for values in parameters if many else [parameters]:
            with driver.cursor() as own:
                own.execute("SAVEPOINT before")
                own.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", values)
                found = own.fetchone()[0]
                plan = (json.loads(found) if isinstance(found, str) else found)[0]
                own.execute("ROLLBACK TO before")
            total[0] += plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"]
            total[1] += plan["Execution Time"]

    audit = AuditLog(database, actor="bench")
    event.listen(database.writer, "before_cursor_execute", explain)
    try:
        with suppress(_RolledBackError), audit.transaction() as tx:
            lease = leasing.take_lease(tx, worker_id="bench", limit=BATCH, ttl_s=60.0, **options)
            assert lease is not None
            assert len(lease.jobs) == BATCH
            tx.flush()
            raise _RolledBackError
    finally:
        event.remove(database.writer, "before_cursor_execute", explain)
    return int(total[0]), total[1]


class _RolledBackError(Exception):
    """Rolls back the lease after its cost was measured."""


def test_a_lease_costs_the_same_at_any_depth(postgres_server: str) -> None:
    from tests.integration.conftest import new_postgres_database

    found: dict[str, dict[int, tuple[int, float]]] = {"common": {}, "rare": {}}
    for depth in DEPTHS:
        with new_postgres_database(postgres_server) as url, filled(url, depth) as database:
            for _ in range(3):  # the first round reads into memory what the others find there
                found["common"][depth] = cost(database)
                # No other checkpoint is loaded, so the group with one batch has priority.
                found["rare"][depth] = cost(database, resident=[f"digest-{RARE}"])
    for name, costs in found.items():
        least = min(buffers for buffers, _ in costs.values())
        for depth, (buffers, milliseconds) in costs.items():
            print(f"{name:6} {depth:9,} ready: {buffers:5} buffers, {milliseconds:.2f} ms, x{buffers / least:.2f}")
        assert max(buffers for buffers, _ in costs.values()) <= 1.5 * least


def test_a_lease_costs_the_same_beside_dead_entries_that_a_snapshot_holds(postgres_server: str) -> None:
    from tests.integration.conftest import new_postgres_database

    with new_postgres_database(postgres_server) as url, filled(url, DEPTHS[-1]) as database:
        cost(database)
        clean = cost(database)
        with database.snapshot() as held:
            held.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            held.execute(text("SELECT count(*) FROM campaign"))
            with database.write() as connection:
                connection.execute(
                    text(
                        "UPDATE job SET status = 'succeeded' WHERE id IN (SELECT id FROM job WHERE status = 'ready'"
                        " AND group_id IN (1, 2, 3, 4, 5) ORDER BY id LIMIT 200000)"
                    )
                )
            blind = cost(database)
            cursor = leasing.Cursor()
            # The cursor that leases of five groups would have left.
            with database.read() as connection:
                firsts = connection.execute(
                    text("SELECT group_id, min(id) - 1 FROM job WHERE status = 'ready' GROUP BY group_id")
                )
                cursor.after = {group_id: (100, before) for group_id, before in firsts}
            hinted = cost(database, cursor=cursor)
    for name, (buffers, milliseconds) in {"clean": clean, "without cursor": blind, "with cursor": hinted}.items():
        print(f"{name:15} {buffers:6} buffers, {milliseconds:.2f} ms, x{buffers / clean[0]:.2f}")
    assert hinted[0] <= 1.5 * clean[0]
