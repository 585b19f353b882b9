"""Debian's pgbouncer in front of the test server, with the settings of its package."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
import sqlalchemy

IGNORING_OPTIONS = "ignore_startup_parameters = options\n"
STOCK = """
[databases]
* = host={host} port={port} user={user}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = any
auth_file = {folder}/users.txt
pool_mode = {mode}
default_pool_size = 10
max_client_conn = 200
admin_users = postgres
logfile = {folder}/log
"""


@contextmanager
def pgbouncer(server_url: str, mode: str, more: str = "") -> Iterator[int]:
    """The port of a pooler in front of that server; skips the test if pgbouncer is not installed."""
    from tests.integration.conftest import free_port, served

    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed: apt-get install pgbouncer")
    url, port = sqlalchemy.make_url(server_url), free_port()
    # As root, pgbouncer switches to another user, who may not enter pytest's own folder.
    with tempfile.TemporaryDirectory(prefix="sdp-pgbouncer-") as name:
        folder, settings = Path(name), Path(name) / "pgbouncer.ini"
        (folder / "users.txt").write_text("")
        host = url.host or str(url.query["host"])
        settings.write_text(
            STOCK.format(
                host=host, port=url.port or 5432, user=url.username, listen_port=port, folder=folder, mode=mode
            )
            + more
        )
        # As the server's own user, who may enter the folder of its socket.
        user = Path(host).owner() if host.startswith("/") else "nobody"
        as_user = ["-u", user] if os.geteuid() == 0 else []
        for path in (folder, *folder.iterdir()):
            path.chmod(0o777)
        with served([program, *as_user, str(settings)], port, folder):
            yield port


def through(pooler_port: int, url: str) -> str:
    """The URL of the same database through the pooler."""
    given = sqlalchemy.make_url(url)
    return f"postgresql+psycopg://{quote(given.username or 'postgres')}@127.0.0.1:{pooler_port}/{given.database}"
