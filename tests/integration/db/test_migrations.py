"""Migrating a database to this release's schema, on SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from sdpipeline.db import migrate
from sdpipeline.db.connection import Database, open_database
from sdpipeline.db.tables import metadata
from sdpipeline.errors import DatabaseUnavailableError


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database without tables."""
    sqlite = request.param == "sqlite"
    database = open_database(f"sqlite:///{tmp_path / 'e.db'}" if sqlite else request.getfixturevalue("postgres_url"))
    yield database
    database.close()


def test_migrating_says_from_where_to_where_and_again_does_nothing(empty: Database) -> None:
    assert migrate.current(empty) is None
    assert migrate.upgrade(empty) == (None, migrate.newest())
    assert migrate.upgrade(empty) == (migrate.newest(), migrate.newest())
    assert migrate.current(empty) == migrate.newest()


def test_the_migrations_make_the_schema_that_the_code_declares(empty: Database) -> None:
    migrate.upgrade(empty)
    with empty.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": False})
        assert compare_metadata(context, metadata) == []


def test_several_processes_may_migrate_at_once(empty: Database) -> None:
    url = empty.writer.url.render_as_string(hide_password=False)
    found: list[tuple[str | None, str]] = []

    def run() -> None:
        database = open_database(url)
        found.append(migrate.upgrade(database))
        database.close()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found, key=str) == sorted(
        [(None, migrate.newest()), *[(migrate.newest(), migrate.newest())] * 3], key=str
    )


def test_a_migration_that_waits_for_a_lock_gives_up_and_changes_nothing(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "LOCK_TIMEOUT_S", 1)
    database = open_database(postgres_url)
    with database.write() as holder:
        holder.execute(text(f"SELECT pg_advisory_xact_lock({migrate._ADVISORY_LOCK})"))
        with pytest.raises(DatabaseUnavailableError, match="lock timeout"):
            migrate.upgrade(database)
    assert migrate.current(database) is None
    database.close()


def test_the_hot_tables_are_vacuumed_long_before_a_fifth_is_dead(postgres_url: str) -> None:
    database = open_database(postgres_url)
    migrate.upgrade(database)
    with database.read() as connection:
        rows = connection.execute(text("SELECT relname, reloptions FROM pg_class WHERE relkind = 'r'")).all()
    options = {row.relname: row.reloptions for row in rows}
    for table in ("job", "lease", "attempt"):
        assert "autovacuum_vacuum_scale_factor=0.01" in options[table]
    database.close()


def test_every_partial_index_is_there(empty: Database) -> None:
    migrate.upgrade(empty)
    names = {index["name"] for index in sqlalchemy.inspect(empty.reader).get_indexes("job")}
    assert names >= {"ix_job_ready", "ix_job_leased", "ix_job_waiting"}


def test_a_migration_that_is_the_victim_of_a_deadlock_is_run_again(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = open_database(postgres_url)
    migrate.upgrade(database)
    tries: list[int] = []

    def once_in_a_circle(*_: object) -> None:
        tries.append(len(tries))
        if len(tries) == 1:
            with database.write() as mine:
                mine.execute(text("DO $$ BEGIN RAISE EXCEPTION 'a circle' USING ERRCODE = '40P01'; END $$"))

    monkeypatch.setattr("alembic.command.upgrade", once_in_a_circle)
    assert migrate.upgrade(database) == (migrate.newest(), migrate.newest())
    assert tries == [0, 1]
    database.close()
