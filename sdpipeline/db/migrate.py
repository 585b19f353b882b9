"""Database migrations to this release's schema, from a checkout or an installed wheel."""

from __future__ import annotations

import re
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

from sqlalchemy import Connection, String, column, inspect, select, table, text

from sdpipeline.db.connection import Database
from sdpipeline.db.server_checks import require_direct
from sdpipeline.db.tables import metadata
from sdpipeline.errors import DatabaseUnavailableError

if TYPE_CHECKING:
    from alembic.config import Config

_ADVISORY_LOCK = 7_305_011_948
"""Key of the advisory lock that lets one process migrate at a time."""

LOCK_TIMEOUT_S = 10
"""A migration that waits longer for a busy table would block everyone behind it, so it gives up."""


MAX_TRIES = 5
"""Limit of tries: a reader with another table order may cause a deadlock once, hardly five times."""

_DEADLOCK = "40P01"
_SCRIPT = re.compile(r"\d{4}_\w+\.py")
_VERSION_TABLE = table("alembic_version", column("version_num", String))


def upgrade(database: Database) -> tuple[str | None, str]:
    """Run missing migrations in one process at a time; return the revision before and after."""
    for _ in range(MAX_TRIES - 1):
        try:
            return _upgrade(database)
        except DatabaseUnavailableError as error:
            if not _deadlocked(error):
                raise
    return _upgrade(database)


def _deadlocked(error: DatabaseUnavailableError) -> bool:
    """Return True if the database only resolved a deadlock by rolling everything back."""
    return getattr(getattr(error.__cause__, "orig", None), "sqlstate", None) == _DEADLOCK


def _upgrade(database: Database) -> tuple[str | None, str]:
    from alembic import command

    with database.write() as connection:
        require_direct(connection, "db upgrade")
        if not database.is_sqlite:
            connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S}s'"))
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})"))
        before = _revision(connection)
        with as_file(files("sdpipeline") / "migrations") as folder:
            config = _config(str(folder))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        return before, newest()


def current(database: Database) -> str | None:
    """Return the schema's revision, or None for an empty database."""
    with database.read() as connection:
        return _revision(connection)


def suits(revision: str | None) -> bool:
    """Return True if this release's code works on that schema: its own, or a newer one.

    A newer schema must work with the previous release's code too.
    """
    known = _revisions()
    return revision is not None and (revision == known[-1] or revision not in known)


def newest() -> str:
    """Return the revision that this release's code was written for."""
    return _revisions()[-1]


def _revisions() -> list[str]:
    """Return this release's revisions, oldest first, by the names of the migrations: ``0001_first_schema.py``.

    Alembic would import each of them, and every command asks for the newest.
    """
    names = (script.name for script in (files("sdpipeline") / "migrations" / "versions").iterdir())
    found = sorted(name.partition("_")[0] for name in names if _SCRIPT.fullmatch(name))
    if not found:
        raise AssertionError("the package holds no migrations")
    return found


def _revision(connection: Connection) -> str | None:
    """Return what Alembic's MigrationContext would; importing Alembic takes a tenth of a second."""
    if not inspect(connection).has_table(_VERSION_TABLE.name):
        return None
    found: str | None = connection.scalar(select(_VERSION_TABLE.c.version_num))
    return found


def _config(folder: str) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", folder.replace("%", "%%"))
    config.attributes["metadata"] = metadata
    return config
