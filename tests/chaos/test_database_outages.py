"""Outages that the database reports itself: workers wait for their end, and commands report them in one line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from sdpipeline import cli
from sdpipeline.audit import load_key
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database, open_database
from sdpipeline.storage import LocalStore
from tests.chaos.invariants import violations
from tests.chaos.local_workers import ChaosWorkers
from tests.chaos.postgres import PostgresServer
from tests.factories import chains, published, statuses

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

PATIENCE_S = 100.0
WORKER = "w1"
"""A login that is not a superuser, so that connection limits apply to it."""


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return f"outage_{abs(hash(request.node.name))}"


@pytest.fixture
def database(crashing_postgres: PostgresServer, name: str) -> Iterator[Database]:
    """A migrated database in which the workers' login has all privileges."""
    opened = open_database(crashing_postgres.new_database(name))
    with opened.write() as connection:
        exists = connection.exec_driver_sql(f"SELECT 1 FROM pg_roles WHERE rolname = '{WORKER}'").first()
        connection.exec_driver_sql(f"ALTER ROLE {WORKER} LOGIN" if exists else f"CREATE ROLE {WORKER} LOGIN")
        for things in ("TABLES", "SEQUENCES"):
            connection.exec_driver_sql(f"GRANT ALL ON ALL {things} IN SCHEMA public TO {WORKER}")
    yield opened
    opened.close()


def administer(server: PostgresServer, *statements: str) -> None:
    """Run statements as the server's owner, then terminate every worker's connection."""
    engine = sqlalchemy.create_engine(server.url("postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
        connection.exec_driver_sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{WORKER}'")
    engine.dispose()


def wait_until(condition: Callable[[], object], what: str) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < ends, what
        time.sleep(0.05)


def all_say(chaos: ChaosWorkers, text: str) -> bool:
    """True once the log of every worker contains that text."""
    logs = [chaos.home / f"worker-{worker.pid}.log" for worker in chaos.workers]
    return all(log.exists() and text in log.read_text() for log in logs)


def ran(capsys: pytest.CaptureFixture[str], *words: object, exit_code: int = 0) -> Any:
    capsys.readouterr()
    assert cli.run([*map(str, words), "--json"]) == exit_code, capsys.readouterr()
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("begin", "end", "said"),
    [
        (
            "ALTER DATABASE {name} SET default_transaction_read_only = on",
            "ALTER DATABASE {name} RESET default_transaction_read_only",
            "read-only transaction",
        ),
        (f"ALTER ROLE {WORKER} CONNECTION LIMIT 0", f"ALTER ROLE {WORKER} CONNECTION LIMIT -1", "too many connections"),
    ],
    ids=["read-only", "no connection left"],
)
def test_workers_wait_for_the_end_of_an_outage(  # noqa: PLR0917 -- fixtures and parameters
    begin: str,
    end: str,
    said: str,
    crashing_postgres: PostgresServer,
    database: Database,
    name: str,
    home: Path,
) -> None:
    published(AuditLog(database, actor="user:test"), chains(40, "draft", "scene"))
    chaos = ChaosWorkers(
        home, crashing_postgres.url(name, WORKER), seed=0, workers=2, settings={"SDP_LEASE_TTL_S": "5"}
    )
    pids = [worker.pid for worker in chaos.workers]
    try:
        wait_until(lambda: "succeeded" in statuses(database), "no job was done")
        administer(crashing_postgres, begin.format(name=name))
        wait_until(lambda: all_say(chaos, said), f"no worker said {said!r}")
        left = statuses(database).count("succeeded")
        # Sessions that began during the outage stay open, so a worker must not keep its connections from then.
        engine = sqlalchemy.create_engine(crashing_postgres.url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(end.format(name=name))
        engine.dispose()
        assert left < 80, "the outage came too late to tell"
        chaos.finish(database)
    finally:
        chaos.stop()
    assert (chaos.crashes, [worker.pid for worker in chaos.workers]) == ([], pids)
    store, key = LocalStore(home / "storage"), load_key(home / "seal.pem", create=True)
    assert violations(database, store, key) == []


@pytest.mark.long
def test_a_worker_that_starts_while_the_database_restarts_waits_for_it(
    crashing_postgres: PostgresServer, database: Database, name: str, home: Path
) -> None:
    published(AuditLog(database, actor="user:test"), chains(4))
    crashing_postgres.crash()
    chaos = ChaosWorkers(home, crashing_postgres.url(name, WORKER), seed=0, workers=2)
    pids = [worker.pid for worker in chaos.workers]
    try:
        wait_until(lambda: all_say(chaos, "database_unavailable"), "no worker waits")
    finally:
        crashing_postgres.start()
    try:
        chaos.finish(database)
    finally:
        chaos.stop()
    assert (chaos.crashes, [worker.pid for worker in chaos.workers]) == ([], pids)


def test_a_worker_with_a_wrong_database_name_does_not_wait(
    crashing_postgres: PostgresServer, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chaos = ChaosWorkers(home, crashing_postgres.url("no_such_database"), seed=0, workers=0)
    for setting, value in chaos.environment.items():
        monkeypatch.setenv(setting, value)
    monkeypatch.chdir(home)
    (error,) = ran(capsys, "worker", exit_code=2)["errors"]
    assert error["key"] == "SDP_DATABASE_URL"
    assert "does not exist" in error["message"]


def test_a_standby_is_found_by_doctor_and_named_by_whatever_writes(  # noqa: PLR0917 -- fixtures
    crashing_postgres: PostgresServer,
    database: Database,
    name: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    published(AuditLog(database, actor="user:test"), chains(2))
    database.close()
    file = home / "autumn.yaml"
    file.write_text("name: autumn\ncheckpoint: shapes\nstages: [{id: a, task: text-to-image, prompt: a red circle}]\n")
    load_key(home / "seal.pem", create=True)
    with crashing_postgres.standby() as standby:
        chaos = ChaosWorkers(home, standby.url(name), seed=0, workers=0)
        for setting, value in (chaos.environment | {"SDP_SIGNING__SEAL_KEY_FILE": str(home / "seal.pem")}).items():
            monkeypatch.setenv(setting, value)
        monkeypatch.chdir(home)
        checks = {check["name"]: check for check in ran(capsys, "doctor", exit_code=3)["checks"]}
        assert "standby" in checks["database: writes"]["detail"]
        assert "primary" in checks["database: writes"]["fix"]
        for words in (["submit", file], ["pause", "spring"], ["audit", "seal"], ["cancel", "spring"]):
            (error,) = ran(capsys, *words, exit_code=1)["errors"]
            assert "read-only transaction" in error["message"]
            assert "primary" in error["fix"]
        status = ran(capsys, "status")
        assert (status["campaigns"][0]["jobs"]["ready"], status["database"]["writable"]) == (2, False)
        assert "standby" in status["database"]["reason"]
