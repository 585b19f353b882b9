"""Process of the gpu-worker flow: work until nothing is left or it is stopped, shown in Prefect as chunks."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from sdpipeline.orchestration.artifacts import best_effort
from sdpipeline.shutdown import Stop, deferred
from sdpipeline.worker.worker import WorkerSummary

_log = structlog.get_logger(__name__)

CHUNK_S = 45.0
LISTEN_EVERY_S = 1.0


def redirect_output(path: Path) -> None:
    """Append this process's output to the file from now on."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def run_until_stopped(work: Callable[[Stop], None]) -> None:
    """Run ``work`` in a separate thread, and forward SIGTERM to it from the main thread.

    Prefect's handler of that signal raises in the main thread, at any instruction. If the process has another handler,
    Prefect kills it at once to cancel or reschedule. Raises TerminationSignal when the work has ended.
    """
    from prefect.exceptions import TerminationSignal

    stop, begin = Stop(), threading.Event()
    termination: TerminationSignal | None = None

    def work_once_begun() -> None:
        begin.wait()
        work(stop)

    with ThreadPoolExecutor(1, thread_name_prefix="gpu-worker") as pool:
        try:
            with deferred(signal.SIGTERM):  # if raised while the thread starts, nothing would wait for the thread
                working = pool.submit(copy_context().run, work_once_begun)
            begin.set()
            while not working.done():
                try:
                    # With a timeout: another thread may have got the signal, which does not wake this one.
                    working.exception(timeout=LISTEN_EVERY_S)
                except TimeoutError:
                    continue
                except TerminationSignal as received:
                    termination = received
                    stop.ask(received.signal)
        except BaseException:  # a signal between two lines: the pool still waits for the work
            stop.ask(signal.SIGTERM)
            begin.set()
            raise
    working.result()
    if termination is not None:
        with state_of_the_server():
            raise termination


@contextmanager
def state_of_the_server() -> Iterator[None]:
    """Make Prefect log the state that a terminated run has on the server.

    For a run that is cancelled from there, it would log "Finished in state Running()".
    """
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext
    from prefect.exceptions import TerminationSignal

    try:
        yield
    except TerminationSignal:
        context = FlowRunContext.get()
        if context is not None and context.flow_run is not None:
            with best_effort(), get_client(sync_client=True) as client:
                context.flow_run.state = client.read_flow_run(context.flow_run.id).state
        raise


@dataclass(frozen=True, slots=True)
class Chunks:
    """Running work that Prefect sees as consecutive chunks; the device waits for none of them."""

    working: Future[WorkerSummary]
    watcher: int = field(default_factory=lambda: os.getppid())  # noqa: PLW0108 - looked up when called

    @property
    def watched(self) -> bool:
        """Return True while the parent process lives.

        A process whose parent died gets another parent, and its device the next worker.
        """
        return os.getppid() == self.watcher

    def wait(self) -> None:
        """Wait until the chunk is over, the parent has died, or the work has ended; raises the work's error."""
        ends_at = time.monotonic() + CHUNK_S
        while not self.working.done() and self.watched and (left := ends_at - time.monotonic()) > 0:
            wait([self.working], timeout=min(left, LISTEN_EVERY_S))
        if self.working.done():
            self.working.result()

    def run(self, chunk: Callable[[int], object]) -> None:
        """Call ``chunk``, which waits, until the work is over or the parent has died."""
        for number in itertools.count(1):
            chunk(number)
            if self.working.done() or not self.watched:
                return


@contextmanager
def in_chunks(work: Callable[[], WorkerSummary], stop: threading.Event) -> Iterator[Chunks]:
    """Run ``work`` in a separate thread; at the end of the block, stop it and wait for it."""
    with ThreadPoolExecutor(1, thread_name_prefix="device") as pool:
        working = pool.submit(work)
        try:
            yield Chunks(working)
        except Exception as error:
            _log.warning("worker_stopping", error=repr(error))  # its batch finishes first, which may take long
            raise
        finally:
            stop.set()
    working.result()
