"""Signals of a process: shutdown gracefully at the first one and immediately at the second; deferring and masking."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGTERM_EXIT_CODE = 143
GIVING_BACK_S = 5.0
"""How long a process that leaves at once waits for its leases to be released, before it leaves anyway."""


class Stop(threading.Event):
    """Event that is set once the process was asked to stop; ``at_once`` is True after a second signal."""

    def __init__(self) -> None:
        super().__init__()
        self.received: int | None = None
        self.at_once = False

    def ask(self, number: int) -> None:
        """Record a signal."""
        self.at_once = self.received is not None
        self.received = self.received or number
        self.set()

    @property
    def exit_code(self) -> int:
        """Return the exit code that a shell expects after a signal: 130 for Ctrl-C, 143 for SIGTERM; 1 without one."""
        return 128 + self.received if self.received is not None else 1


@contextmanager
def handle_signals(*numbers: int) -> Iterator[Stop]:
    """Handle these signals inside the block; the previous handlers are restored afterwards.

    Python runs a handler only between two instructions of the main thread, which may spend a whole batch in one call.
    The wake-up descriptor is written to at once, and another thread reads it.
    """
    stop = Stop()
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    listener = threading.Thread(target=_listen, args=(read_end, frozenset(numbers), stop), daemon=True)
    handlers = {number: signal.signal(number, _on_signal) for number in numbers}
    descriptor = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    listener.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(write_end)
        listener.join()
        os.close(read_end)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit inside the block, so that it unwinds like Ctrl-C; without effect outside of the
    main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave_with_code(*_: object) -> NoReturn:
        raise SystemExit(SIGTERM_EXIT_CODE)

    before = signal.signal(signal.SIGTERM, leave_with_code)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def deferred(number: signal.Signals) -> Iterator[None]:
    """Defer a signal to the end of the block. Python runs handlers in this thread, whichever thread gets the signal."""
    came: list[int] = []
    before = signal.signal(number, lambda received, _frame: came.append(received))
    try:
        yield
    finally:
        signal.signal(number, before)
        if came:
            signal.raise_signal(number)


@contextmanager
def masked(number: signal.Signals) -> Iterator[None]:
    """Block a signal in this thread; processes and threads that start in the block inherit the mask for good."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})


def leave(exit_code: int, give_back: Callable[[], object]) -> NoReturn:
    """Release leases, then end this process even if its threads are busy or stuck."""
    giving = threading.Thread(target=give_back, daemon=True)
    giving.start()
    giving.join(GIVING_BACK_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _listen(read_end: int, numbers: frozenset[int], stop: Stop) -> None:
    while received := os.read(read_end, 1):
        if received[0] in numbers:
            stop.ask(received[0])


def _on_signal(_number: int, _frame: object) -> None:
    """Do nothing: without a Python handler the signal would end the process; the listening thread acts on it."""
