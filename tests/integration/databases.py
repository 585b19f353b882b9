"""Migrated databases for test suites that run on both SQLite and PostgreSQL."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database, open_database
from sdpipeline.db.migrate import upgrade
from sdpipeline.db.tables import metadata

BACKENDS = ("sqlite", "postgresql")

on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
"""For tests of concurrency that cannot occur with a single writer."""

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For rules that run in Python on rows that other tests show to be the same on both databases."""


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file to copy, which is faster than migrating one for each test."""
    path = tmp_path_factory.mktemp("migrated") / "empty.db"
    database = open_database(f"sqlite:///{path}")
    upgrade(database)
    database.close()
    return path


@pytest.fixture(scope="session")
def migrated_postgres(postgres_server: str) -> Iterator[str]:
    """A migrated database that is emptied before each test; its commits do not wait for the disk."""
    from tests.integration.conftest import new_postgres_database

    with new_postgres_database(postgres_server) as url:
        database = open_database(url)
        with database.write() as connection:
            name = sqlalchemy.make_url(url).database
            connection.exec_driver_sql(f"ALTER DATABASE {name} SET synchronous_commit = off")
        upgrade(database)
        database.close()
        yield url


@pytest.fixture(params=BACKENDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty, migrated database of each kind."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("migrated_sqlite"), tmp_path / "queue.db")
        return f"sqlite:///{tmp_path / 'queue.db'}"
    url = str(request.getfixturevalue("migrated_postgres"))
    database = open_database(url)
    with database.write() as connection:
        tables = ", ".join(table.name for table in metadata.sorted_tables)
        connection.exec_driver_sql(f"TRUNCATE {tables} RESTART IDENTITY")
    database.close()
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An empty, migrated database of each kind."""
    opened = open_database(database_url)
    yield opened
    opened.close()


@pytest.fixture
def audit(database: Database) -> AuditLog:
    """This process's audit log in it."""
    return AuditLog(database, actor="user:test")
