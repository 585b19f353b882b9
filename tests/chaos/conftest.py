"""The chaos suite uses the same real databases as the integration tests, and servers of its own to crash."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.postgres import PostgresServer
from tests.chaos.postgres import postgres_server as crashing_server
from tests.integration.conftest import (  # noqa: F401 -- fixtures
    Bucket,
    free_port,
    new_bucket,
    postgres_server,
    s3_credentials,
    served,
)
from tests.integration.databases import (  # noqa: F401 -- fixtures
    audit,
    database,
    database_url,
    migrated_postgres,
    migrated_sqlite,
)


@pytest.fixture(scope="session")
def crashing_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server that tests may crash."""
    with crashing_server() as server:
        yield server


@pytest.fixture(scope="session")
def object_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server that lists a thousand keys per page, as S3 does."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with served(command, port, tmp_path_factory.mktemp("objects"), environment=os.environ):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def bucket(object_server: str, s3_credentials: None) -> Bucket:  # noqa: F811 -- the fixture above
    """An empty bucket."""
    return new_bucket(object_server)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Home folder of one test's workers."""
    (tmp_path / "home").mkdir()
    return tmp_path / "home"
