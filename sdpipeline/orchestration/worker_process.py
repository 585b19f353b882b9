"""What the gpu-worker flow does: one process that works until nothing is left or it is told to end, told in chunks."""

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

from sdpipeline.app.services import WorkerSummary
from sdpipeline.orchestration.artifacts import best_effort
from sdpipeline.shutdown import Stop

_log = structlog.get_logger(__name__)

CHUNK_S = 45.0
LISTEN_EVERY_S = 1.0


def redirect_output(path: Path) -> None:
    """What this process prints from now on goes to the end of this file."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def until_told(work: Callable[[Stop], None]) -> None:
    """Work in a thread of its own while the main thread waits: for its end, or for a SIGTERM, which it hears of.

    Prefect's handler of that signal raises in the main thread, whatever runs there; and Prefect kills a process at
    once that has another handler when it wants to cancel or reschedule. Raises TerminationSignal when the work ended.
    """
    from prefect.exceptions import TerminationSignal

    stop, begin = Stop(), threading.Event()
    told: TerminationSignal | None = None

    def begun() -> None:
        begin.wait()
        work(stop)

    with ThreadPoolExecutor(1, thread_name_prefix="gpu-worker") as pool:
        try:
            with _held_back(signal.SIGTERM):  # raised while the thread starts, it would leave nobody who waits for it
                working = pool.submit(copy_context().run, begun)
            begin.set()
            while not working.done():
                try:
                    # Not without end: another thread may have got the signal, which wakes nobody.
                    working.exception(timeout=LISTEN_EVERY_S)
                except TimeoutError:
                    continue
                except TerminationSignal as received:
                    told = received
                    stop.ask(received.signal)
        except BaseException:  # a signal between two lines: the pool waits for the work all the same
            stop.ask(signal.SIGTERM)
            begin.set()
            raise
    working.result()
    if told is not None:
        with state_of_the_server():
            raise told


@contextmanager
def state_of_the_server() -> Iterator[None]:
    """Have Prefect log the state that a terminated run has on the server: of one that is cancelled from there, it
    would log "Finished in state Running()".
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


@contextmanager
def _held_back(number: signal.Signals) -> Iterator[None]:
    """A signal that comes meanwhile comes at the end. Whichever thread gets it, Python hears of it in this one."""
    came: list[int] = []
    before = signal.signal(number, lambda received, _frame: came.append(received))
    try:
        yield
    finally:
        signal.signal(number, before)
        if came:
            signal.raise_signal(number)


@dataclass(frozen=True, slots=True)
class Chunks:
    """Work that goes on while Prefect is told of it in chunks, one after the other: the device waits for none."""

    working: Future[WorkerSummary]
    watcher: int = field(default_factory=lambda: os.getppid())  # noqa: PLW0108 - looked up when called

    @property
    def watched(self) -> bool:
        """Whether the parent lives: a process whose parent died gets another, and its device the next worker."""
        return os.getppid() == self.watcher

    def wait(self) -> None:
        """Until the chunk is over, the process that watches has died, or the work is, whose error is raised."""
        ends_at = time.monotonic() + CHUNK_S
        while not self.working.done() and self.watched and (left := ends_at - time.monotonic()) > 0:
            wait([self.working], timeout=min(left, LISTEN_EVERY_S))
        if self.working.done():
            self.working.result()

    def tell(self, chunk: Callable[[int], object]) -> None:
        """Call ``chunk``, which waits, until the work is over or nobody watches it any more."""
        for number in itertools.count(1):
            chunk(number)
            if self.working.done() or not self.watched:
                return


@contextmanager
def in_chunks(work: Callable[[], WorkerSummary], stop: threading.Event) -> Iterator[Chunks]:
    """Work in a thread of its own. At the end of the block, however it comes, it is told to end, and waited for."""
    with ThreadPoolExecutor(1, thread_name_prefix="device") as pool:
        working = pool.submit(work)
        try:
            yield Chunks(working)
        except Exception as error:
            _log.warning("worker_ends", error=repr(error))  # its batch comes first, and may take long
            raise
        finally:
            stop.set()
    working.result()
