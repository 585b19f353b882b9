"""PostgreSQL behind pgbouncer: everything except `db upgrade` and `bench` works, in session and transaction mode."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import text

from sdpipeline import cli
from sdpipeline.audit import load_key
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database, open_database
from sdpipeline.db.scratch import scratch_database
from sdpipeline.db.server_checks import find_pooler
from sdpipeline.errors import DatabaseRefusedError, SettingsError
from sdpipeline.storage import LocalStore
from tests.chaos.invariants import violations
from tests.chaos.local_workers import ChaosWorkers
from tests.factories import chains, published, statuses
from tests.integration.databases import on_postgresql
from tests.integration.poolers import IGNORING_OPTIONS, pgbouncer, through

CAMPAIGN = """
name: spring
checkpoint: shapes
seeds: {start: 0, count: 4}
stages:
  - {id: draft, task: text-to-image, prompt: a red circle}
"""


@pytest.fixture(scope="module")
def poolers(postgres_server: str) -> Iterator[Mapping[str, int]]:
    """The ports of two poolers, one per mode."""
    with pgbouncer(postgres_server, "session") as session, pgbouncer(postgres_server, "transaction") as transaction:
        yield {"session": session, "transaction": transaction}


@pytest.fixture(params=["session", "transaction"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pooled(poolers: Mapping[str, int], mode: str, database_url: str) -> Iterator[Database]:
    """An empty, migrated database through the pooler."""
    opened = open_database(through(poolers[mode], database_url))
    yield opened
    opened.close()


def address(database: Database) -> str:
    return database.writer.url.render_as_string(hide_password=False)


def ran(capsys: pytest.CaptureFixture[str], *words: object, exit_code: int = 0) -> Any:
    """The JSON document of a command, run in this process."""
    capsys.readouterr()
    assert cli.run([*map(str, words), "--json"]) == exit_code, capsys.readouterr()
    return json.loads(capsys.readouterr().out)


@on_postgresql
def test_several_workers_make_a_campaign_behind_a_pooler(pooled: Database, tmp_path: Path) -> None:
    published(AuditLog(pooled, actor="user:test"), chains(100, "draft", "scene"))
    chaos = ChaosWorkers(tmp_path / "home", address(pooled), seed=0, settings={"SDP_LEASE_TTL_S": "20"})
    try:
        chaos.finish(pooled)
    finally:
        chaos.stop()
    assert chaos.crashes == []
    assert statuses(pooled) == ["succeeded"] * 200
    store, key = LocalStore(tmp_path / "home/storage"), load_key(tmp_path / "home/seal.pem", create=True)
    assert violations(pooled, store, key) == []


@on_postgresql
def test_every_command_works_behind_a_pooler(
    pooled: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, file = tmp_path / "home", tmp_path / "spring.yaml"
    file.write_text(CAMPAIGN)
    chaos = ChaosWorkers(home, address(pooled), seed=0, workers=0)
    load_key(home / "seal.pem", create=True)
    monkeypatch.chdir(tmp_path)
    more = {"SDP_SIGNING__SEAL_KEY_FILE": str(home / "seal.pem"), "SDP_RETENTION__PICTURES_DAYS": "0"}
    for name, value in (chaos.environment | more).items():
        monkeypatch.setenv(name, value)
    assert ran(capsys, "plan", file)["jobs"]["new"] == 4
    assert ran(capsys, "submit", file)["added"] == 4
    ran(capsys, "pause", "spring")
    ran(capsys, "resume", "spring")
    assert ran(capsys, "cancel", "spring")["cancelled"] == 4
    ran(capsys, "retry", "spring", "--status", "cancelled")
    assert ran(capsys, "worker", "--until-idle")["succeeded"] == 4
    status = ran(capsys, "status")
    assert (status["campaigns"][0]["images"], status["database"]["writable"]) == (4, True)
    assert len(ran(capsys, "jobs", "spring")["jobs"]) == 4
    ran(capsys, "audit", "seal")
    assert ran(capsys, "audit", "verify")["ok"]
    assert ran(capsys, "retention")["pictures"] == 4
    assert ran(capsys, "audit", "verify")["ok"]


@on_postgresql
def test_the_limit_on_idle_transactions_holds_in_each_transaction_and_stays_in_it(
    pooled: Database, database_url: str
) -> None:
    direct = open_database(database_url)
    for database in (pooled, direct):
        with database.snapshot() as connection:
            assert connection.execute(text("SHOW idle_in_transaction_session_timeout")).scalar() == "1min"
            assert connection.execute(text("SHOW transaction_isolation")).scalar() == "repeatable read"
        with database.write() as connection:
            assert connection.execute(text("SHOW idle_in_transaction_session_timeout")).scalar() == "1min"
            assert connection.execute(text("SHOW transaction_isolation")).scalar() == "read committed"
    direct.close()
    engine = sqlalchemy.create_engine(address(pooled), poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:  # pgbouncer hands out the most recently used server connection
        assert connection.execute(text("SHOW idle_in_transaction_session_timeout")).scalar() == "0"


@on_postgresql
def test_the_mode_of_a_pooler_is_found(pooled: Database, mode: str, database_url: str) -> None:
    assert str(find_pooler(pooled)) == f"a connection pooler in {mode} mode"
    direct = open_database(database_url)
    assert find_pooler(direct) is None
    direct.close()


@on_postgresql
def test_upgrade_and_bench_want_a_direct_connection(
    pooled: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDP_DATABASE_URL", address(pooled))
    for words in (["db", "upgrade"], ["bench", "queue", "--jobs", "8"]):
        (error,) = ran(capsys, *words, exit_code=2)["errors"]
        assert error["key"] == "SDP_DATABASE_URL"
        assert "needs a direct connection" in error["message"]


@on_postgresql
def test_a_bench_never_works_in_the_live_tables_behind_a_pooler_that_ignores_options(
    postgres_server: str, database_url: str
) -> None:
    with pgbouncer(postgres_server, "session", IGNORING_OPTIONS) as port:
        url = through(port, database_url)
        with pytest.raises(SettingsError, match="needs a direct connection"), scratch_database(url):
            pass


@on_postgresql
def test_a_start_up_option_that_the_pooler_refuses_is_named(poolers: Mapping[str, int], database_url: str) -> None:
    database = open_database(through(poolers["session"], database_url) + "?options=-c%20work_mem%3D8MB")
    with pytest.raises(DatabaseRefusedError, match="unsupported startup parameter: options") as refused:
        database.read().__enter__()
    assert refused.value.fix
    assert "remove that parameter" in refused.value.fix


@on_postgresql
def test_statement_mode_is_refused_in_one_line(postgres_server: str, database_url: str) -> None:
    with pgbouncer(postgres_server, "statement") as port:
        database = open_database(through(port, database_url))
        with pytest.raises(DatabaseRefusedError, match="statement pooling mode"):
            database.read().__enter__()
