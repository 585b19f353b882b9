"""Delivery server: deliver pictures for the worker process that starts this one.

:mod:`sdpipeline.worker.delivery_process` is the client. This process ends with its worker, however that ended.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

from sdpipeline import logs
from sdpipeline.app.keys import picture_key
from sdpipeline.app.stores import s3_options
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import open_database
from sdpipeline.errors import SdpError, SettingsError
from sdpipeline.storage import open_store
from sdpipeline.worker.delivery import LocalDeliverer
from sdpipeline.worker.delivery_process import BEAT_S, Destination

PR_SET_PDEATHSIG = 1
NICENESS = 10
"""Lower priority than the process that drives the device, for machines with few cores."""


def main(descriptors: Sequence[str]) -> None:
    """Send heartbeats on the first of these file descriptors; deliver the pictures that the others bring until they
    are closed."""
    _die_with_owner()
    for number in (signal.SIGTERM, signal.SIGINT):  # sent to a whole process group or container
        signal.signal(number, signal.SIG_IGN)
    heart, *connections = [Connection(int(each)) for each in descriptors]
    # Before the niceness is set, which Linux keeps per thread: heartbeats must not be late on a busy machine.
    threading.Thread(target=_beat, args=(heart,), daemon=True).start()
    os.nice(NICENESS)
    try:
        to: Destination = connections[0].recv()
        deliverer = _deliverer(to, most_kept=2 * len(connections))
    except EOFError:
        return
    except SdpError as error:
        connections[0].send((False, error))
        return
    connections[0].send((True, None))
    threads = [threading.Thread(target=_answer, args=(each, deliverer), daemon=True) for each in connections]
    for thread in threads:
        thread.start()
    threads[0].join()
    os._exit(0)  # do not wait for deliveries under way: the caller that would get their result is gone


def _die_with_owner() -> None:
    """Have the kernel kill this process when the thread that started it ends, even while this process is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _beat(heart: Connection) -> None:
    with suppress(OSError):
        while True:
            heart.send_bytes(b"")
            time.sleep(BEAT_S)


def _deliverer(to: Destination, *, most_kept: int) -> LocalDeliverer:
    logs.configure_logging(to.settings)
    key = picture_key(to.settings)
    if key.fingerprint != to.certificate:
        raise SettingsError("the signing key changed after this worker started: restart the worker")
    store = open_store(to.storage_url, s3_options(to.settings))
    audit = AuditLog(open_database(to.database_url), actor=to.actor)
    return LocalDeliverer(store, key, audit, most_kept=most_kept)


def _answer(connection: Connection, deliverer: LocalDeliverer) -> None:
    while True:
        try:
            asked = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            request = pickle.loads(asked)  # noqa: S301 - from the parent process
            answer = pickle.dumps((True, deliverer.deliver(request)))
        except Exception as error:  # noqa: BLE001 -- raised again by the client
            answer = _raised(error)
        try:
            connection.send_bytes(answer)
        except OSError:
            return


def _raised(error: Exception) -> bytes:
    """Pickle an error for the client.

    An error of another package comes with its traceback; an error that cannot be pickled is replaced by its traceback.
    """
    if not isinstance(error, SdpError):
        error.add_note(traceback.format_exc())
    try:
        answer = pickle.dumps((False, error))
        pickle.loads(answer)  # noqa: S301 - what was just written
    except Exception:  # noqa: BLE001 -- a library's error may contain anything
        return pickle.dumps((False, RuntimeError("".join(traceback.format_exception(error)))))
    return answer


if __name__ == "__main__":
    main(sys.argv[1:])
