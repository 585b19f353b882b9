"""Deliver pictures for a worker process, which starts this one by :mod:`sdpipeline.worker.delivery_process`.

This process ends with its worker, however that ended.
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
from sdpipeline.app import services
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import open_database
from sdpipeline.errors import SdpError, SettingsError
from sdpipeline.storage import open_store
from sdpipeline.worker.delivery import LocalDeliverer
from sdpipeline.worker.delivery_process import BEAT_S, Destination

PR_SET_PDEATHSIG = 1
NICENESS = 10
"""Whoever gives work to a device goes first where cores are short."""


def main(descriptors: Sequence[str]) -> None:
    """Send heartbeats on the first of these file descriptors, and answer on the others until they are closed."""
    _die_with_owner()
    for number in (signal.SIGTERM, signal.SIGINT):  # told by those who tell a whole group or container
        signal.signal(number, signal.SIG_IGN)
    heart, *connections = [Connection(int(each)) for each in descriptors]
    # Before the others: Linux keeps a niceness for each thread, and this one must not be late on a busy machine.
    threading.Thread(target=_beat, args=(heart,), daemon=True).start()
    os.nice(NICENESS)
    try:
        _, (to,) = connections[0].recv()
        deliverer = _deliverer(to)
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
    os._exit(0)  # what is still being delivered is not waited for: nobody would hear of it


def _die_with_owner() -> None:
    """Have the kernel kill this process with the thread that started it, also while this process is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _beat(heart: Connection) -> None:
    with suppress(OSError):
        while True:
            heart.send_bytes(b"")
            time.sleep(BEAT_S)


def _deliverer(to: Destination) -> LocalDeliverer:
    logs.configure_logging(to.settings)
    key = services.picture_key(to.settings)
    if key.fingerprint != to.certificate:
        raise SettingsError("the key that signs pictures was changed since this worker began: start the worker again")
    store = open_store(to.storage_url, services.s3_options(to.settings))
    return LocalDeliverer(store, key, AuditLog(open_database(to.database_url), actor=to.actor))


def _answer(connection: Connection, deliverer: LocalDeliverer) -> None:
    while True:
        try:
            asked = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            method, arguments = pickle.loads(asked)  # noqa: S301 - from whoever started it
            answer = pickle.dumps((True, getattr(deliverer, method)(*arguments)))
        except Exception as error:  # noqa: BLE001 -- it is raised on the other side
            answer = _raised(error)
        try:
            connection.send_bytes(answer)
        except OSError:
            return


def _raised(error: Exception) -> bytes:
    """The error as it is read on the other side, with the traceback of one that is not ours, or that alone."""
    if not isinstance(error, SdpError):
        error.add_note(traceback.format_exc())
    try:
        answer = pickle.dumps((False, error))
        pickle.loads(answer)  # noqa: S301 - what was just written
    except Exception:  # noqa: BLE001 -- there is no knowing what an error of a library is made of
        return pickle.dumps((False, RuntimeError("".join(traceback.format_exception(error)))))
    return answer


if __name__ == "__main__":
    main(sys.argv[1:])
