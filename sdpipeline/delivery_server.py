"""Delivers pictures for another process: ``python -m sdpipeline.delivery_server``, started by
:mod:`sdpipeline.delivery_process`, with which it ends, however that ended."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.managers import BaseManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from sdpipeline import bootstrap, telemetry
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import open_database
from sdpipeline.delivery import LocalDeliverer
from sdpipeline.delivery_process import Destination
from sdpipeline.storage import open_store

NICENESS = 10
"""Whoever gives work to a device goes first where cores are short."""


class _Answers(BaseManager):
    """Each thread that asks has a connection of its own, and a thread here."""


def main() -> None:
    """Told on stdin for whom to deliver, say on stdout where to ask; the end of stdin is that of whoever asks."""
    to, secret = pickle.load(sys.stdin.buffer)  # noqa: S301 - from whoever started it
    telemetry.configure_logging(to.settings)
    os.nice(NICENESS)
    with _serving(_deliverer(to), secret) as address:
        print(address, flush=True)  # noqa: T201
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody reads there any more
        _read_to_end(sys.stdin.buffer)
    os._exit(0)  # what is still being delivered is not waited for: nobody would hear of it


def _deliverer(to: Destination) -> LocalDeliverer:
    store = open_store(to.storage_url, bootstrap.s3_options(to.settings))
    audit = AuditLog(open_database(to.database_url), actor=to.actor)
    return LocalDeliverer(store, bootstrap.picture_key(to.settings), audit)


@contextmanager
def _serving(deliverer: LocalDeliverer, secret: bytes) -> Iterator[str]:
    """Answer in the background while the block lasts; the address."""
    _Answers.register("deliverer", callable=lambda: deliverer)
    with TemporaryDirectory(prefix="sdpipeline-", ignore_cleanup_errors=True) as folder:
        address = str(Path(folder) / "socket")
        server = _Answers(address=address, authkey=secret).get_server()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield address


def _read_to_end(file: BinaryIO) -> None:
    while file.read(4096):
        pass


if __name__ == "__main__":
    main()
