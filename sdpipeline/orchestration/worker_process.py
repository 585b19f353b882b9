"""What the gpu-worker flow does: one process that works in chunks until nothing is left or it is told to end."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

from sdpipeline.bootstrap import WorkerSummary
from sdpipeline.stopping import Stop

CHUNK_S = 45.0


def redirect_output(path: Path) -> None:
    """What this process prints from now on goes to the end of this file."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def until_told(work: Callable[[Stop], None]) -> None:
    """Work in a thread of its own while the main thread waits: for its end, or for a SIGTERM, which it hears of.

    Prefect's handler of that signal raises in the main thread, whatever runs there; and Prefect kills a process at
    once that has another handler when it wants to cancel or reschedule. Raises TerminationSignal when the work ended.
    """
    from prefect.exceptions import TerminationSignal

    stop = Stop()
    told: TerminationSignal | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="gpu-worker") as pool:
        # A signal while the thread starts would leave nobody who knows it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        working = pool.submit(copy_context().run, work, stop)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            while not working.done():
                try:
                    working.exception()
                except TerminationSignal as received:
                    told = received
                    stop.ask(received.signal)
        except BaseException:  # a signal between two lines: the pool waits for the work all the same
            stop.ask(signal.SIGTERM)
            raise
    working.result()
    if told is not None:
        raise told


def work_in_chunks(work: Callable[[int], WorkerSummary], stop: threading.Event) -> None:
    """Call ``work`` until it reports that nothing is left, the worker must end, or nobody watches it any more."""
    watcher = os.getppid()
    for number in itertools.count(1):
        # A process whose parent died gets another: its device is the next worker's that is started there.
        if work(number).idle or stop.is_set() or os.getppid() != watcher:
            return
