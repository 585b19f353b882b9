"""Translation of database driver errors by SQLSTATE and by SQLite result code: outages, refusals, wrong settings."""

from __future__ import annotations

import re
import shutil
import sqlite3
from pathlib import Path
from typing import Any

from sdpipeline.errors import DatabaseRefusedError, DatabaseUnavailableError, Mistake, SdpError, SettingsError

SETTING = "SDP_DATABASE_URL"

READ_ONLY_FIX = "name the primary server in SDP_DATABASE_URL, or wait until this one accepts writes again"
_RESTARTING = "wait until the server runs again; its log says why it ended"
_TRY_AGAIN = "try again: another transaction held a lock"
_PREPARED = "try again: a connection pooler was found, and prepared statements are off from now on"
_CONNECTIONS = "wait, raise the server's connection limit, or put pgbouncer in front of it"
_CREDENTIALS = "check the user, the password and the database in SDP_DATABASE_URL"
_TLS = "check sslmode, sslrootcert and sslcert in SDP_DATABASE_URL"
_DIRECT = "remove that parameter from SDP_DATABASE_URL, or connect to the server directly"

_READ_ONLY_SESSION = "25006"
_OUTAGES = {
    "08": "check the network and the pooler between this machine and the database server",
    _READ_ONLY_SESSION: READ_ONLY_FIX,
    "25P03": "find out why this process was frozen for so long",
    "25P04": "raise transaction_timeout",
    "26000": _PREPARED,
    "40": _TRY_AGAIN,
    "42P05": _PREPARED,
    "53": "add the resource that the database server lacks (disk, memory or connections)",
    "53100": "free space on the database server's disk",
    "53200": "give the database server more memory",
    "53300": _CONNECTIONS,
    "55": _TRY_AGAIN,
    "57": _RESTARTING,
    "57014": "raise statement_timeout, or find out who cancelled the statement",
    "58": "look at the database server's disk and log",
}
"""Fixes of outages, by SQLSTATE or by its class of two characters."""

_REFUSALS = ("28", "3D", "57P04")
"""Wrong user, password or database."""

_NO_PERMISSION = "42501"
_LIMIT_EXCEEDED = "54"
"""An operational error for the driver, but the statement or its row is too large: waiting does not help."""

# libpq does not report the SQLSTATE of a failed connection attempt, only text. Servers with another language
# than English fall through to a plain outage.
_REFUSED_CONNECTIONS = (
    (r"unsupported startup parameter|not allowed in statement pooling mode", _DIRECT),
    (r"authentication failed|auth failed|no password supplied|no pg_hba\.conf entry", _CREDENTIALS),
    (r"(role|database|user) \"[^\"]*\" does not exist|no such (database|user)", _CREDENTIALS),
    (r"not permitted to log in|permission denied for database", _CREDENTIALS),
    (r"certificate|does not support SSL|private key file", _TLS),
)
_FAILED_CONNECTIONS = (
    (r"the database system is|terminating connection|shutting down", _RESTARTING),
    (r"too many (clients|connections)|connection slots are reserved|no more connections allowed", _CONNECTIONS),
    (r"session is read-only|server is in hot standby mode", READ_ONLY_FIX),
)


def translated(error: BaseException | None, place: str, *, connection_lost: bool = False) -> SdpError | None:
    """Translate a driver's error at ``place``; None if the statement or its data is at fault.

    ``connection_lost`` says that the connection ended with the error.
    """
    if error is None:
        return None
    message = f"{place}: {first_line(error)}"
    if isinstance(error, sqlite3.Error):
        return _of_sqlite(error, message, place)
    state = sqlstate(error)
    if state == _NO_PERMISSION:
        fix = "use the login that deploy/roles.sql grants this right, and run that file after each db upgrade"
        return SettingsError(Mistake(key=SETTING, message=f"this database login may not do that: {message}", fix=fix))
    if state is None:
        return _of_connection(error, message, connection_lost=connection_lost)
    if state.startswith(_REFUSALS):
        return DatabaseRefusedError(message, fix=_CREDENTIALS)
    if state.startswith("08") and (refused := _matching(_REFUSED_CONNECTIONS, str(error))):
        return DatabaseRefusedError(message, fix=refused)
    if outage := _OUTAGES.get(state) or _OUTAGES.get(state[:2]):
        return DatabaseUnavailableError(message, fix=outage)
    if connection_lost or (_is_operational(error) and not state.startswith(_LIMIT_EXCEEDED)):
        return DatabaseUnavailableError(message)
    return None


def sqlstate(error: BaseException | None) -> str | None:
    """Return the SQLSTATE of a driver's error; None if the server sent none."""
    state = getattr(error, "sqlstate", None)
    return state if isinstance(state, str) else None


def first_line(error: BaseException) -> str:
    """Return the first line of the driver's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _of_connection(error: BaseException, message: str, *, connection_lost: bool) -> SdpError | None:
    if not (connection_lost or _is_operational(error)):
        return None
    text = str(error)
    refused = _matching(_REFUSED_CONNECTIONS, text)
    failed = _matching(_FAILED_CONNECTIONS, text)
    if refused is not None and failed is None:
        return DatabaseRefusedError(message, fix=refused)
    return DatabaseUnavailableError(message, fix=failed)


def _matching(patterns: tuple[tuple[str, str], ...], text: str) -> str | None:
    return next((fix for pattern, fix in patterns if re.search(pattern, text)), None)


def _is_operational(error: BaseException) -> bool:
    """Check the class by its name, so that users of SQLite need no psycopg."""
    return any(kind.__name__ == "OperationalError" for kind in type(error).mro())


# SQLite. The low byte of a result code is its kind: https://sqlite.org/rescode.html

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_FORBIDDEN = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH)
_NO_SPACE_BYTES = 1 << 20


def sqlite_kind(error: BaseException | None) -> int | None:
    """Return the primary result code of a SQLite error."""
    code: Any = getattr(error, "sqlite_errorcode", None)
    return code & 0xFF if isinstance(code, int) else None


def reopens(error: BaseException | None) -> bool:
    """Return True if this connection cannot be used after the error, even once its cause is gone.

    A PostgreSQL session that began read-only stays read-only, and one with a demoted primary stays with it. A SQLite
    file that was opened read-only, or was moved away, stays so for its connection.
    """
    kinds = (*_FORBIDDEN, *_DAMAGED, sqlite3.SQLITE_IOERR)
    return sqlstate(error) == _READ_ONLY_SESSION or sqlite_kind(error) in kinds or is_prepared_elsewhere(error)


def is_prepared_elsewhere(error: BaseException | None) -> bool:
    """Return True if a pooler had prepared the statement on another server connection."""
    return sqlstate(error) in {"26000", "42P05"}


def _of_sqlite(error: sqlite3.Error, message: str, file: str) -> SdpError | None:
    kind = sqlite_kind(error)
    if kind in _DAMAGED:
        fix = "restore the file from a backup, or name another one"
        return SettingsError(Mistake(key=SETTING, message=message, fix=fix))
    # SQLite reports a wrong statement (SQLITE_ERROR) with the same class as an unavailable database.
    if kind in {None, sqlite3.SQLITE_ERROR} or not isinstance(error, sqlite3.OperationalError):
        return None
    fix = _sqlite_fix(kind, Path(file))
    return DatabaseRefusedError(message, fix=fix) if kind in _FORBIDDEN else DatabaseUnavailableError(message, fix=fix)


def _sqlite_fix(kind: int | None, file: Path) -> str:
    if kind == sqlite3.SQLITE_FULL or is_full(file.parent):
        return f"free space on the disk of {file.parent}"
    if kind in _FORBIDDEN:
        return f"make {file} and its folder writable for this user, or copy the home to where it is"
    if kind in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
        return f"wait, or end the process that holds the write lock: fuser {file}"
    return f"check the disk of {file.parent}"


def is_full(folder: Path) -> bool:
    """Return True if SQLite cannot grow its files in that folder."""
    try:
        return shutil.disk_usage(folder).free < _NO_SPACE_BYTES
    except OSError:
        return False
