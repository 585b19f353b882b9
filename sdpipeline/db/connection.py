"""Opening a database: one writer and one reader, the database's clock, and its errors translated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Double, Engine, Table, create_engine, event, make_url
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction

from sdpipeline.errors import DatabaseUnavailableError, Mistake, SettingsError

CONNECT_TIMEOUT_S = 10
SQLITE_BUSY_TIMEOUT_S = 30


class now_s(GenericFunction[float]):  # noqa: N801 -- reads as the SQL function it is
    """The database's own clock, in seconds since 1970."""

    type = Double()
    inherit_cache = True


@compiles(now_s, "sqlite")
def _now_on_sqlite(*_: Any, **__: Any) -> str:
    # unixepoch('subsec') is NULL before SQLite 3.42
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now_s, "postgresql")
def _now_on_postgresql(*_: Any, **__: Any) -> str:
    return "extract(epoch FROM clock_timestamp())::double precision"


@dataclass(frozen=True, slots=True)
class Database:
    """Two pools on one database. On PostgreSQL they are the same pool.

    On SQLite a reader that begins a write transaction would queue behind the writer, and a writer
    that begins as a reader fails when it upgrades: so each has its own engine.
    """

    writer: Engine
    reader: Engine

    @property
    def is_sqlite(self) -> bool:
        """Whether this is the embedded default."""
        return self.writer.dialect.name == "sqlite"

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One short transaction that may write; commits at the end."""
        with _translated(), self.writer.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One transaction that only reads."""
        with _translated(), self.reader.begin() as connection:
            yield connection

    def close(self) -> None:
        """Give all connections back."""
        self.writer.dispose()
        self.reader.dispose()


def open_database(url: str) -> Database:
    """Connect lazily to SQLite or PostgreSQL; raises SettingsError for any other URL."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise SettingsError(_wrong_url("is no database URL")) from error
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        return _open_sqlite(url, Path(parsed.database or ""))
    if backend != "postgresql":
        raise SettingsError(_wrong_url(f"names the database {backend!r}"))
    if parsed.get_driver_name() in ("", "psycopg2"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    try:
        engine = create_engine(
            parsed, pool_pre_ping=True, connect_args={"connect_timeout": CONNECT_TIMEOUT_S}, pool_size=8
        )
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise SettingsError(
            Mistake(key="SDP_DATABASE_URL", message="needs psycopg", fix="pip install 'sdpipeline[postgres]'")
        ) from error
    return Database(engine, engine)


def sqlite_path(url: str) -> Path | None:
    """The file behind a SQLite URL, or None for any other database."""
    parsed = make_url(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def insert_ignoring(connection: Connection, table: Table) -> postgresql.Insert | sqlite.Insert:
    """``INSERT ... ON CONFLICT DO NOTHING`` in the dialect at hand."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    return sqlite.insert(table).on_conflict_do_nothing()


def _wrong_url(fault: str) -> Mistake:
    return Mistake(
        key="SDP_DATABASE_URL", message=fault, fix="write sqlite:///file.db or postgresql://user:password@host/database"
    )


def _open_sqlite(url: str, path: Path) -> Database:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer, reader = (
        create_engine(url, connect_args={"timeout": SQLITE_BUSY_TIMEOUT_S, "isolation_level": None}) for _ in range(2)
    )
    _on_connect(writer, "PRAGMA journal_mode = WAL", "PRAGMA synchronous = NORMAL", "PRAGMA foreign_keys = ON")
    _on_connect(reader, "PRAGMA query_only = ON")
    _on_begin(writer, "BEGIN IMMEDIATE")
    _on_begin(reader, "BEGIN")
    return Database(writer, reader)


def _on_connect(engine: Engine, *pragmas: str) -> None:
    @event.listens_for(engine, "connect")
    def _configure(dbapi_connection: Any, _record: Any) -> None:
        for pragma in pragmas:
            dbapi_connection.execute(pragma)


def _on_begin(engine: Engine, statement: str) -> None:
    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(statement)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        raise DatabaseUnavailableError(_first_line(error)) from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise DatabaseUnavailableError(_first_line(error)) from error
        raise


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__
