"""Services of a process: an open database, storage and audit log, opened once by a command or a flow."""

from __future__ import annotations

import getpass
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from sdpipeline import __version__, settings
from sdpipeline.db import migrate, queries
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database, open_database, sqlite_path
from sdpipeline.db.waiting import until_available
from sdpipeline.errors import BadInputError, Mistake, SettingsError
from sdpipeline.settings import Settings

if TYPE_CHECKING:
    from sdpipeline.storage import ObjectStore


def load_settings(home: Path | None = None) -> Settings:
    """Load the settings of this process; raises SettingsError."""
    return settings.load(home=home)


@dataclass(frozen=True)
class Services:
    """Open database, storage and audit log of a process; see :func:`open_services`.

    Threads may share them. They survive an outage of the database: broken connections are opened again at their next
    use. They are not pickled: a child process opens its own.
    """

    settings: Settings
    database: Database
    audit: AuditLog

    @cached_property
    def store(self) -> ObjectStore:
        """The store that the settings name; opened at first use, because many commands need only the database."""
        from sdpipeline.app.stores import open_storage

        return open_storage(self.settings)

    def campaign_id(self, name: str) -> int:
        """Return the id of the team's campaign; raises BadInputError listing the known campaigns."""
        with self.database.read() as connection:
            found = queries.campaign_id(connection, team=self.settings.team, name=name)
            if found is not None:
                return found
            names = ", ".join(queries.campaign_names(connection, team=self.settings.team)) or "none yet"
        raise BadInputError(Mistake(message=f"no campaign {name!r}", fix=f"there are: {names}"))


@contextmanager
def open_services(
    settings: Settings, *, create: bool = True, until: threading.Event | None = None
) -> Iterator[Services]:
    """Open the database at this release's schema; ``create`` makes a missing embedded database.

    With ``until``, an outage of the database is waited out until that event is set.
    """
    if not create and not database_exists(settings):
        fix = "sdpipeline demo, or sdpipeline submit FILE; --home names another folder"
        raise BadInputError(Mistake(message=f"no campaign was submitted in {settings.home} yet", fix=fix))
    database = open_database(settings.database)
    check = partial(ensure_schema, settings, database)
    try:
        check() if until is None else until_available(check, until)
        yield Services(settings, database, AuditLog(database, actor=actor(settings)))
    finally:
        database.close()


@contextmanager
def existing_database(settings: Settings) -> Iterator[Database | None]:
    """Open the database at this release's schema; yield None if the embedded one does not exist yet."""
    if not database_exists(settings):
        yield None
        return
    with open_services(settings) as services:
        yield services.database


def database_exists(settings: Settings) -> bool:
    """Return True if there is a database to compare with; ``plan`` creates none."""
    path = sqlite_path(settings.database)
    return path is None or path.is_file()


def ensure_schema(settings: Settings, database: Database) -> None:
    """Migrate the embedded database; any other must have been migrated by ``db upgrade``."""
    revision = migrate.current(database) if database_exists(settings) else None
    if migrate.suits(revision):
        return
    if settings.embedded:
        migrate.upgrade(database)
    else:
        message = f"the database's schema is at {revision or 'nothing'}, this release needs {migrate.newest()}"
        raise SettingsError(Mistake(key="SDP_DATABASE_URL", message=message, fix="sdpipeline db upgrade"))


def actor(settings: Settings) -> str:
    """Return the actor and release that every audit event of this process records."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"user:{settings.actor or f'{user}@{socket.gethostname()[:80]}'} sdpipeline/{__version__}"
