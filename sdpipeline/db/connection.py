"""Database connections: one writer and one reader, the database's clock, and translated errors."""

from __future__ import annotations

import itertools
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import unquote

from sqlalchemy import URL, Connection, Double, Engine, ExceptionContext, Table, create_engine, event, make_url
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction

from sdpipeline.db import driver_errors
from sdpipeline.db.sqlite_reader import open_reader
from sdpipeline.errors import PERCENT_ENCODE, DatabaseUnavailableError, Mistake, SettingsError

__all__ = ["Connection", "Database", "copy_rows", "insert_ignoring", "now_s", "open_database", "sqlite_path"]

SQLITE_BUSY_TIMEOUT_S = 30
DECODES_PATHS = make_url("sqlite:///%20").database == " "
"""True if SQLAlchemy decodes the path of a SQLite URL."""

CHUNK = 5000

_POSTGRES_CONNECTION = {
    # Per address of a host name: two of them must fail within 15 s.
    "connect_timeout": 5,
    # A server that vanished silently is noticed within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
# Our own BEGIN opens each transaction, in the round trip that the driver's BEGIN would take.
_POSTGRES_DRIVER = {"autocommit": True}
_IDLE_TIMEOUT = "idle_in_transaction_session_timeout"
# A process that is frozen in the middle of a transaction must not hold its row locks for ever. The transaction sets the
# limit, because a pooler refuses start-up options and keeps no session's settings.
_LIMITED = f"; SET LOCAL {_IDLE_TIMEOUT} = '60s'"
_ISOLATION = "sdp_isolation"


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
    """Two pools on one database; on PostgreSQL they are the same pool.

    On SQLite each has its own engine. A reader that began a write transaction would queue behind the writer, and a
    writer that began as a reader would fail when it upgrades.
    """

    writer: Engine
    reader: Engine

    @property
    def is_sqlite(self) -> bool:
        """True if this is the embedded default."""
        return self.writer.dialect.name == "sqlite"

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Open one short transaction that may write; commits at the end."""
        with _translated(self.writer.url), self.writer.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open one read-only transaction."""
        with _translated(self.reader.url), self.reader.begin() as connection:
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """Open one read-only transaction that sees the database as of its first statement."""
        with _translated(self.reader.url), self.reader.connect() as connection:
            if not self.is_sqlite:
                connection.execution_options(**{_ISOLATION: " ISOLATION LEVEL REPEATABLE READ"})
            with connection.begin():
                yield connection

    def close(self) -> None:
        """Close all connections."""
        self.writer.dispose()
        self.reader.dispose()


def open_database(url: str) -> Database:
    """Connect lazily to SQLite or PostgreSQL; raises SettingsError for any other URL."""
    try:
        parsed = _parsed(url)
    except (ArgumentError, ValueError):
        # `from None`: such an error quotes the URL, password included.
        raise SettingsError(_wrong_url("is not a database URL")) from None
    if url.count("@") > 1 and parsed.get_backend_name() != "sqlite":
        # The text after the first @ would be taken for the host, and shown.
        raise SettingsError(_wrong_url("holds more than one @"))
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        return _open_sqlite(parsed)
    if backend != "postgresql":
        raise SettingsError(_wrong_url(f"names the database {backend!r}"))
    if parsed.get_driver_name() not in ("", "psycopg", "psycopg2"):
        raise SettingsError(_wrong_url(f"names the driver {parsed.get_driver_name()!r}"))
    return _open_postgresql(parsed.set(drivername="postgresql+psycopg"))


def sqlite_path(url: str) -> Path | None:
    """Return the file of a SQLite URL; None for any other database."""
    parsed = _parsed(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def _parsed(url: str) -> URL:
    """Parse a database URL; raises ArgumentError or ValueError. A SQLite path is percent-decoded once.

    SQLAlchemy 2.1 decodes it, 2.0 does not: the same URL must name the same file in both.
    """
    parsed = make_url(url)
    if DECODES_PATHS or parsed.get_backend_name() != "sqlite" or parsed.database is None:
        return parsed
    return parsed.set(database=unquote(parsed.database))


def insert_ignoring(connection: Connection, table: Table) -> postgresql.Insert | sqlite.Insert:
    """Build ``INSERT ... ON CONFLICT DO NOTHING`` in the connection's dialect."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    return sqlite.insert(table).on_conflict_do_nothing()


def copy_rows(connection: Connection, table: Table, columns: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> None:
    """Insert many rows of driver values (JSON as text) in this transaction, with COPY if available.

    A thread sends finished rows while the next ones are made, so that neither side waits for the other.
    """
    names = ", ".join(columns)
    if connection.dialect.name == "sqlite":
        marks, left = ", ".join("?" * len(columns)), iter(rows)
        while chunk := list(itertools.islice(left, CHUNK)):
            connection.exec_driver_sql(f"INSERT INTO {table.name} ({names}) VALUES ({marks})", chunk)  # noqa: S608
        return
    from psycopg.copy import QueuedLibpqWriter

    driver: Any = connection.connection.dbapi_connection
    cursor = driver.cursor()
    try:
        with cursor.copy(f"COPY {table.name} ({names}) FROM STDIN", writer=QueuedLibpqWriter(cursor)) as copy:
            for row in rows:
                copy.write_row(row)
    except connection.dialect.loaded_dbapi.Error as error:
        _keep_first_line(error)
        translated = driver_errors.translated(error, _place(connection.engine.url), connection_lost=bool(driver.closed))
        if translated is None:
            raise
        raise translated from error


def _wrong_url(fault: str) -> Mistake:
    return Mistake(
        key="SDP_DATABASE_URL",
        message=fault,
        fix=f"write sqlite:///file.db or postgresql://user:password@host/database; {PERCENT_ENCODE}",
    )


def _open_sqlite(url: URL) -> Database:
    if url.database in (None, "", ":memory:") or "uri" in url.query:
        raise SettingsError(_wrong_url("does not name a SQLite file that several processes can share"))
    Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
    arguments = {"timeout": SQLITE_BUSY_TIMEOUT_S, "isolation_level": None}
    writer, reader = (create_engine(url, connect_args=arguments, hide_parameters=True) for _ in range(2))
    _on_connect(writer, "PRAGMA journal_mode = WAL", "PRAGMA synchronous = NORMAL", "PRAGMA foreign_keys = ON")
    open_reader(reader)
    _on_begin(writer, "BEGIN IMMEDIATE")
    _on_begin(reader, "BEGIN")
    for engine in (writer, reader):
        _leave_to_parent(engine)
        _reopen_after_errors(engine)
    return Database(writer, reader)


def _open_postgresql(url: URL) -> Database:
    # Options in the URL take precedence.
    arguments = {name: value for name, value in _POSTGRES_CONNECTION.items() if name not in url.query}
    try:
        engine = create_engine(
            url, pool_pre_ping=True, pool_size=8, connect_args=arguments | _POSTGRES_DRIVER, hide_parameters=True
        )
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise SettingsError(
            Mistake(key="SDP_DATABASE_URL", message="needs psycopg", fix="pip install 'sdpipeline[postgres]'")
        ) from error
    _on_begin(engine, "BEGIN{isolation}" + ("" if _IDLE_TIMEOUT in str(url.query.get("options", "")) else _LIMITED))
    _leave_to_parent(engine)
    event.listen(engine, "handle_error", _hide_values)
    _reopen_after_errors(engine)
    _prepare_without_pooler(engine)
    return Database(engine, engine)


def _on_connect(engine: Engine, *pragmas: str) -> None:
    @event.listens_for(engine, "connect")
    def _configure(dbapi_connection: Any, _record: Any) -> None:
        for pragma in pragmas:
            dbapi_connection.execute(pragma)


def _on_begin(engine: Engine, statement: str) -> None:
    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        isolation = connection.get_execution_options().get(_ISOLATION, "")
        connection.exec_driver_sql(statement.format(isolation=isolation))


def _reopen_after_errors(engine: Engine) -> None:
    @event.listens_for(engine, "handle_error")
    def _check(context: ExceptionContext) -> None:
        context.is_disconnect = context.is_disconnect or driver_errors.reopens(context.original_exception)


def _prepare_without_pooler(engine: Engine) -> None:
    """Prepare statements on direct connections only, which saves half of the server's work there.

    A pooler in transaction mode executes each transaction on another server connection, which does not know the
    statements prepared on the previous one. That error also reveals a pooler that :func:`is_pooled` does not recognise.
    """
    found = threading.Event()

    @event.listens_for(engine, "connect")
    def _configure(driver: Any, _record: Any) -> None:
        if found.is_set() or is_pooled(driver):
            driver.prepare_threshold = None

    @event.listens_for(engine, "handle_error")
    def _check(context: ExceptionContext) -> None:
        if driver_errors.is_prepared_elsewhere(context.original_exception):
            found.set()


def is_pooled(driver: Any) -> bool:
    """Return True if psycopg's connection goes through a pooler, which reports a made-up process id to clients."""
    return bool(driver.execute("SELECT pg_backend_pid()").fetchone()[0] != driver.info.backend_pid)


def _leave_to_parent(engine: Engine) -> None:
    """Discard the parent's connections after a fork, so that the child opens its own."""

    @event.listens_for(engine, "connect")
    def _remember(_dbapi_connection: Any, record: Any) -> None:
        record.info["pid"] = os.getpid()

    @event.listens_for(engine, "checkout")
    def _check(_dbapi_connection: Any, record: Any, proxy: Any) -> None:
        if record.info["pid"] != os.getpid():
            record.dbapi_connection = proxy.dbapi_connection = None
            raise DisconnectionError("this connection belongs to the parent process")


def _hide_values(context: ExceptionContext) -> None:
    """Keep the first line of a server's error: its DETAIL and CONTEXT lines hold values, such as prompts."""
    for error in (context.original_exception, context.sqlalchemy_exception):
        if error is not None:
            _keep_first_line(error)


def _keep_first_line(error: BaseException) -> None:
    error.args = tuple(each.strip().split("\n", 1)[0] if isinstance(each, str) else each for each in error.args)


@contextmanager
def _translated(url: URL) -> Iterator[None]:
    try:
        yield
    except PoolTimeoutError as error:
        raise DatabaseUnavailableError(f"{_place(url)}: every connection of this process is in use") from error
    except DBAPIError as error:
        translated = driver_errors.translated(error.orig, _place(url), connection_lost=error.connection_invalidated)
        if translated is None and error.statement is None and not error.params and _is_of_no_server(error.orig):
            translated = SettingsError(_wrong_url(driver_errors.first_line(error.orig)))
        if translated is None:
            raise
        raise translated from error


def _is_of_no_server(error: BaseException | None) -> TypeGuard[BaseException]:
    """Return True for a driver's own error before it contacted a server: it rejects the URL."""
    return error is not None and not isinstance(error, sqlite3.Error) and driver_errors.sqlstate(error) is None


def _place(url: URL) -> str:
    """Return the database's name and host without user, password and options."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    host = url.host or url.query.get("host") or "the local socket"
    return f"database {url.database} at {host}" + (f":{url.port}" if url.port else "")
