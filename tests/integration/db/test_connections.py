"""Databases that are unavailable, slow, locked or shared by processes."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy import select, text

from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database, open_database
from sdpipeline.db.migrate import current, newest, upgrade
from sdpipeline.db.tables import job
from sdpipeline.errors import DatabaseUnavailableError, SettingsError
from tests.factories import chains, completed, leased, published, statuses
from tests.integration.databases import on_postgresql, on_sqlite
from tests.integration.processes import processes


def test_an_unreachable_server_is_named_in_time_without_its_password() -> None:
    database = open_database("postgresql://user:hunter2@127.0.0.1:9/queue")
    started = time.monotonic()
    with (
        pytest.raises(DatabaseUnavailableError, match=r"database queue at 127.0.0.1:9: .*refused") as error,
        database.read(),
    ):
        pass
    assert "hunter2" not in str(error.value)
    assert time.monotonic() - started < 15


def test_a_server_that_never_answers_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        database = open_database(f"postgresql://user:hunter2@127.0.0.1:{silent.getsockname()[1]}/queue")
        started = time.monotonic()
        with pytest.raises(DatabaseUnavailableError, match="timeout"), database.read():
            pass
        assert time.monotonic() - started < 15


def test_a_host_that_does_not_exist_is_named() -> None:
    database = open_database("postgresql://user@no-such-host.invalid/queue")
    with pytest.raises(DatabaseUnavailableError, match=r"no-such-host\.invalid"), database.read():
        pass


def test_a_missing_database_is_named(postgres_server: str) -> None:
    url = sqlalchemy.make_url(postgres_server).set(database="missing").render_as_string(hide_password=False)
    with pytest.raises(DatabaseUnavailableError, match='database "missing" does not exist'), open_database(url).read():
        pass


def test_an_unknown_connection_option_is_a_wrong_setting(postgres_server: str) -> None:
    url = sqlalchemy.make_url(postgres_server).update_query_dict({"hunger": "2"}).render_as_string(hide_password=False)
    with pytest.raises(SettingsError, match="hunger"), open_database(url).read():
        pass


def test_a_statement_that_is_wrong_is_no_unavailable_database(database: Database) -> None:
    with pytest.raises(sqlalchemy.exc.DBAPIError), database.read() as connection:
        connection.execute(text("SELECT * FROM no_such_table"))


@on_postgresql
def test_a_connection_the_server_closed_is_replaced_before_use(audit: AuditLog, database: Database) -> None:
    published(audit, chains(1))
    other = open_database(database.writer.url.render_as_string(hide_password=False))
    with other.write() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    other.close()
    assert completed(audit, leased(audit)) == [True]


@on_postgresql
def test_a_connection_lost_in_the_middle_is_an_unavailable_database(audit: AuditLog, database: Database) -> None:
    published(audit, chains(1))

    def cut() -> None:
        with audit.transaction() as tx:
            tx.connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    with pytest.raises(DatabaseUnavailableError, match="terminat"):
        cut()
    assert completed(audit, leased(audit)) == [True]


@on_postgresql
def test_a_process_frozen_in_a_transaction_does_not_hold_it_for_ever(database: Database) -> None:
    with database.read() as connection:
        limit = connection.execute(text("SHOW idle_in_transaction_session_timeout")).scalar()
    assert limit == "1min"


@on_sqlite
def test_a_reader_sees_the_last_commit_while_a_writer_writes(audit: AuditLog, database: Database) -> None:
    published(audit, chains(1))
    with database.write() as connection:
        connection.execute(job.update().values(status="failed"))
        assert statuses(database) == ["ready"]
    assert statuses(database) == ["failed"]


@on_sqlite
def test_a_reader_cannot_write(database: Database) -> None:
    with pytest.raises(DatabaseUnavailableError, match="readonly"), database.read() as connection:
        connection.execute(job.delete())


def migrate_and_submit(url: str, n: int) -> str:
    database = open_database(url)
    try:
        upgrade(database)
        return str(published(AuditLog(database, actor=f"user:{n}"), chains(20), name=f"campaign-{n}").added)
    finally:
        database.close()


def test_eight_processes_make_and_fill_one_new_sqlite_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new folder' / 'queue.db'}"
    with ProcessPoolExecutor(8, mp_context=processes) as pool:
        assert list(pool.map(migrate_and_submit, [url] * 8, range(8))) == ["20"] * 8
    database = open_database(url)
    assert current(database) == newest()
    with database.read() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA integrity_check")).scalar() == "ok"
        assert len(connection.execute(select(job.c.id)).all()) == 160
    database.close()
