"""What the gpu-worker flow does: one process that works in chunks until nothing is left or it is told to end."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from pathlib import Path

from sdpipeline import stopping
from sdpipeline.bootstrap import WorkerSummary

CHUNK_S = 45.0


@contextmanager
def set_up(log_file: str | None) -> Iterator[threading.Event]:
    """Make this flow run's process a worker's: output to its log file, and SIGTERM lets it finish its batch.

    Prefect's own SIGTERM handler raises in this thread, whatever runs in it; so it is called when the work has ended.
    """
    if log_file is not None:
        _redirect_output(Path(log_file))
    prefects = signal.getsignal(signal.SIGTERM)
    with stopping.told_by(signal.SIGTERM) as stop:
        yield stop
    if stop.is_set() and callable(prefects):
        prefects(signal.SIGTERM, None)


def work_in_chunks(work: Callable[[int], WorkerSummary], stop: threading.Event) -> None:
    """Call ``work`` until it reports that nothing is left, the worker must end, or nobody watches it any more."""
    for number in itertools.count(1):
        if work(number).idle or stop.is_set() or _orphaned():
            return


def _orphaned() -> bool:
    """Whether the dispatcher that started this process is gone; the next one starts workers of its own."""
    parent = parent_process()
    return parent is not None and not parent.is_alive()


def _redirect_output(path: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
