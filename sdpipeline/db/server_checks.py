"""Facts about the database server: does it accept writes, and is a connection pooler in front of it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, func, select, text

from sdpipeline.db.connection import Database, is_pooled
from sdpipeline.db.driver_errors import READ_ONLY_FIX, is_full, translated
from sdpipeline.errors import DatabaseRefusedError, DatabaseUnavailableError, Mistake, SettingsError

_PROBES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooler:
    """A connection pooler; in transaction mode it gives each transaction another server connection."""

    transaction_mode: bool

    def __str__(self) -> str:
        return f"a connection pooler in {'transaction' if self.transaction_mode else 'session'} mode"


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteRefusal:
    """The reason why a database is read-only, and its fix."""

    reason: str
    fix: str | None


def write_refusal(database: Database) -> WriteRefusal | None:
    """Explain why the database accepts no writes; None if it does."""
    try:
        if database.is_sqlite:
            return _sqlite_refusal(Path(str(database.writer.url.database)))
        with database.read() as connection:
            return _read_only(connection)
    except DatabaseUnavailableError as error:
        return WriteRefusal(reason=str(error), fix=error.fix)


def find_pooler(database: Database) -> Pooler | None:
    """Find the pooler in front of PostgreSQL; None for a direct connection and for SQLite.

    If two open clients meet the same server process, the pooler is in transaction mode.
    """
    if database.is_sqlite:
        return None
    with database.read() as connection:
        if not is_pooled(connection.connection.dbapi_connection):
            return None
    for _ in range(_PROBES):
        with database.reader.connect() as one, database.reader.connect() as other:
            if _server_process(one) == _server_process(other):
                return Pooler(transaction_mode=True)
    return Pooler(transaction_mode=False)


def require_direct(connection: Connection, command: str) -> None:
    """Raise SettingsError if a pooler is in front of PostgreSQL."""
    if connection.dialect.name == "postgresql" and is_pooled(connection.connection.dbapi_connection):
        message = f"{command} needs a direct connection, and this one goes through a connection pooler"
        fix = f"for {command}, name the PostgreSQL server's own host and port"
        raise SettingsError(Mistake(key="SDP_DATABASE_URL", message=message, fix=fix))


def _server_process(connection: Connection) -> int:
    """Return the server process of a transaction that ends at once; the client stays connected."""
    with connection.begin():
        return int(connection.execute(select(func.pg_backend_pid())).scalar_one())


def _sqlite_refusal(file: Path) -> WriteRefusal | None:
    """Check a SQLite file without waiting for another process's write transaction."""
    if is_full(file.parent):
        return WriteRefusal(reason=f"the disk of {file.parent} is full", fix=f"free space on the disk of {file.parent}")
    with closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            refusal = translated(error, str(file))
            if isinstance(refusal, DatabaseRefusedError):
                return WriteRefusal(reason=str(refusal), fix=refusal.fix)
    return None


def _read_only(connection: Connection) -> WriteRefusal | None:
    asked = text("SELECT pg_is_in_recovery(), current_setting('transaction_read_only')")
    standby, read_only = connection.execute(asked).one()
    if standby:
        return WriteRefusal(reason="PostgreSQL is a standby: read-only until it is promoted", fix=READ_ONLY_FIX)
    reason = "PostgreSQL is read-only (default_transaction_read_only is on)"
    return WriteRefusal(reason=reason, fix=READ_ONLY_FIX) if read_only == "on" else None
