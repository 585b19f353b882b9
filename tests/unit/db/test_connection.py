"""Database URLs: supported ones, and the errors for all others."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdpipeline.db.connection import open_database, sqlite_path
from sdpipeline.errors import SettingsError


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///queue.db", "queue.db"),
        ("sqlite:////var/lib/queue.db", "/var/lib/queue.db"),
        ("sqlite:////var/my%20queue.db", "/var/my queue.db"),
        ("sqlite:////var/my queue.db", "/var/my queue.db"),
        ("postgresql://host/queue", None),
    ],
)
def test_the_file_behind_an_address_is_known(url: str, path: str | None) -> None:
    assert sqlite_path(url) == (Path(path) if path else None)


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("nonsense", "is not a database URL"),
        ("postgresql://host:port/queue", "is not a database URL"),
        ("mysql://user:hunter2@host/queue", "names the database 'mysql'"),
        ("postgresql+asyncpg://user:hunter2@host/queue", "names the driver 'asyncpg'"),
        ("sqlite://", "does not name a SQLite file"),
        ("sqlite:///:memory:", "does not name a SQLite file"),
        ("sqlite:///file:queue.db?uri=true", "does not name a SQLite file"),
    ],
)
def test_another_address_is_refused_with_the_fix_and_without_its_password(url: str, fault: str) -> None:
    with pytest.raises(SettingsError, match=fault) as refused:
        open_database(url)
    assert "write sqlite:///file.db or postgresql://" in str(refused.value)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg2", "postgresql+psycopg"])
def test_postgresql_is_reached_through_psycopg_whatever_the_address_says(scheme: str) -> None:
    database = open_database(f"{scheme}://host/queue")
    assert database.writer.driver == "psycopg"
    assert database.reader is database.writer
