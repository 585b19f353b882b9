"""Read-only SQLite connections, which also work on a disk that is read-only or full."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Engine, event

from sdpipeline.db.driver_errors import sqlite_kind

_NO_SHARED_MEMORY = {
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}
_IMMUTABLE = "sdp_immutable"


def open_reader(engine: Engine) -> None:
    """Make the engine's connections refuse writes, and read without a lock if the folder takes no new file.

    A reader of a database in WAL mode makes the files -wal and -shm if they are missing. On a disk that takes none,
    nobody writes either, so the file is read as it is. If there is a -wal with changes, only a reader that can make
    -shm may read them, and the error stands.
    """

    @event.listens_for(engine, "do_connect")
    def _connect(_dialect: Any, record: Any, arguments: tuple[str], options: dict[str, Any]) -> sqlite3.Connection:
        connection: sqlite3.Connection = sqlite3.connect(*arguments, **options)
        try:
            connection.execute("PRAGMA query_only = ON")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError as error:
            connection.close()
            file = Path(arguments[0])
            if sqlite_kind(error) not in _NO_SHARED_MEMORY or not file.is_file() or _has_changes(file):
                raise
            record.info[_IMMUTABLE] = True
            place = f"file:{quote(str(file.absolute()))}?mode=ro&immutable=1"
            connection = sqlite3.connect(place, uri=True, **options)
        return connection

    @event.listens_for(engine, "checkin")
    def _forget(_connection: Any, record: Any) -> None:
        """Discard the connection, so that the next reader checks again if the file can be locked."""
        if record.info.get(_IMMUTABLE):
            record.invalidate()


def _has_changes(file: Path) -> bool:
    log = file.with_name(file.name + "-wal")
    return log.is_file() and log.stat().st_size > 0
