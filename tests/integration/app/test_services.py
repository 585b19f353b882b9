"""Services: polling uses the database that the command opened."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from sqlalchemy import event, text
from sqlalchemy.pool import Pool

from sdpipeline.app.maintenance import release_worker_leases
from sdpipeline.app.queries import campaign_progress, checkpoint_aliases, failures, finish_report, newest_pictures
from sdpipeline.app.services import Services
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import open_database
from sdpipeline.errors import BadInputError
from sdpipeline.orchestration import local_run
from sdpipeline.settings import Settings
from tests.factories import job_spec, published
from tests.integration.databases import on_postgresql, on_sqlite

POLLS = 20


@pytest.fixture
def services(audit: AuditLog, tmp_path: Path) -> Services:
    """Open services with a submitted campaign ``spring``."""
    published(audit, [job_spec()], name="spring")
    return Services(Settings(home=tmp_path), audit.database, audit)


@contextmanager
def counted_connections() -> Iterator[list[object]]:
    """Number of connections that any pool of this process opens."""
    opened: list[object] = []

    def count(connection: object, _record: object) -> None:
        opened.append(connection)

    event.listen(Pool, "connect", count)
    try:
        yield opened
    finally:
        event.remove(Pool, "connect", count)


@on_sqlite
def test_polling_opens_no_database(services: Services) -> None:
    with counted_connections() as opened:
        for _ in range(POLLS):
            campaign_progress(services, "spring")
            failures(services, "spring")
            newest_pictures(services, "spring")
            finish_report(services, "spring")
            checkpoint_aliases(services, services.campaign_id("spring"))
            release_worker_leases(services, pid=1)
    assert len(opened) <= 2  # SQLite's writer and reader


@on_sqlite
def test_a_progress_bar_opens_no_database(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_run, "DRAW_EVERY_S", 0.01)
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    with counted_connections() as opened, local_run._live_progress(services, "spring", console):
        time.sleep(0.5)
    assert len(opened) <= 2
    assert isinstance(console.file, io.StringIO)
    assert "spring: 0 of" in console.file.getvalue()


@on_postgresql
def test_open_services_survive_an_outage(services: Services, database_url: str) -> None:
    before = campaign_progress(services, "spring")
    with services.database.read() as connection:
        mine = connection.execute(text("SELECT pg_backend_pid()")).scalar()
    with closing(open_database(database_url)) as other, other.write() as connection:
        connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": mine})
    assert campaign_progress(services, "spring") == before


@on_sqlite
def test_an_unknown_campaign_is_refused_with_the_known_ones(services: Services) -> None:
    with pytest.raises(BadInputError, match=r"no campaign 'autumn'.*there are: spring"):
        services.campaign_id("autumn")
