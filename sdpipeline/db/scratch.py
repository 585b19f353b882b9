"""Scratch database for benchmarks: empty, next to the live one, invisible to others, and dropped afterwards."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import Connection, func, make_url, select, text
from sqlalchemy.exc import ProgrammingError

from sdpipeline.db.connection import Database, open_database, sqlite_path
from sdpipeline.db.migrate import upgrade
from sdpipeline.db.server_checks import require_direct
from sdpipeline.errors import Mistake, SettingsError

PREFIX = "sdp_bench_"
FIRST_CAMPAIGN = 2_000_000_000
"""First campaign id, so that advisory locks, which ignore schemas, collide with nobody else's."""

_HELD = 0x5343
"""The class of the advisory locks that mark a scratch schema as in use."""


@contextmanager
def scratch_database(url: str) -> Iterator[Database]:
    """Create a database at this release's schema for the duration of the block.

    It is a file next to SQLite's, or a schema in PostgreSQL's database. Raises SettingsError if the role may not create
    schemas, or if the connection goes through a pooler. The next measurement drops schemas that a killed one left in
    PostgreSQL.
    """
    path = sqlite_path(url)
    with _file_next_to(path) if path is not None else _schema_in(url) as scratch_url:
        database = open_database(scratch_url)
        try:
            upgrade(database)
            if not database.is_sqlite:
                with database.write() as connection:
                    connection.exec_driver_sql(f"ALTER TABLE campaign ALTER COLUMN id RESTART WITH {FIRST_CAMPAIGN}")
            yield database
        finally:
            database.close()


@contextmanager
def _file_next_to(path: Path) -> Iterator[str]:
    """Create the file on the same disk, because the measurement is about that disk."""
    own = path.parent / f".{PREFIX}{secrets.token_hex(8)}.db"
    try:
        yield f"sqlite:///{own.absolute()}"
    finally:
        for suffix in ("", "-wal", "-shm"):
            own.with_name(own.name + suffix).unlink(missing_ok=True)


@contextmanager
def _schema_in(url: str) -> Iterator[str]:
    """Create a schema that is first in the search path of every connection; a session lock marks it as in use."""
    live, name = open_database(url), f"{PREFIX}{secrets.token_hex(8)}"
    try:
        with live.read() as holder:
            # A pooler drops the search path that keeps the measurement out of the live tables.
            require_direct(holder, "bench")
            # A session lock outlives this transaction's savepoints and is released when the process ends.
            holder.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            holder.execute(select(func.pg_advisory_lock(_HELD, func.hashtext(name))))
            _create(live, name)
            try:
                yield _in_schema(url, name)
            finally:
                holder.execute(select(func.pg_advisory_unlock(_HELD, func.hashtext(name))))
                with live.write() as connection:
                    _drop(connection, name)
    finally:
        live.close()


def _create(live: Database, name: str) -> None:
    try:
        with live.write() as connection:
            _drop_abandoned(connection)
            connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    except SettingsError as error:
        message = "its role may not create the schema for the bench's own tables"
        fix = "GRANT CREATE ON DATABASE ... TO ..., or measure another database of that server"
        raise SettingsError(Mistake(key="SDP_DATABASE_URL", message=message, fix=fix)) from error


def _drop_abandoned(connection: Connection) -> None:
    """Drop schemas of killed measurements: nobody holds their lock."""
    names = connection.execute(text("SELECT nspname FROM pg_namespace WHERE starts_with(nspname, :p)"), {"p": PREFIX})
    for name in names.scalars().all():
        if connection.execute(select(func.pg_try_advisory_xact_lock(_HELD, func.hashtext(name)))).scalar_one():
            with suppress(ProgrammingError), connection.begin_nested():  # another role's
                _drop(connection, name)


def _drop(connection: Connection, name: str) -> None:
    connection.exec_driver_sql(f'DROP SCHEMA IF EXISTS "{name}" CASCADE')


def _in_schema(url: str, name: str) -> str:
    parsed = make_url(url)
    own = str(parsed.query.get("options", ""))
    searched = parsed.update_query_dict({"options": f"{own} -c search_path={name}".strip()})
    return searched.render_as_string(hide_password=False)
