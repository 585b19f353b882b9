"""Signals are deferred, masked and turned into an exit code for the length of a block."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sdpipeline.shutdown import SIGTERM_EXIT_CODE, deferred, exit_on_sigterm, masked


def test_sigterm_unwinds_as_an_exit_inside_the_block_only() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, exit_on_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == SIGTERM_EXIT_CODE
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_leaves_the_handlers_alone() -> None:
    found: list[object] = []

    def look() -> None:
        with exit_on_sigterm():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_deferred_signal_comes_at_the_end_of_the_block() -> None:
    came: list[int] = []
    with _noted(signal.SIGTERM, came), deferred(signal.SIGTERM):
        signal.raise_signal(signal.SIGTERM)
        assert came == []
    assert came == [signal.SIGTERM]


def test_a_masked_signal_is_pending_until_the_end_of_the_block() -> None:
    came: list[int] = []
    with _noted(signal.SIGINT, came), masked(signal.SIGINT):
        signal.raise_signal(signal.SIGINT)
        assert signal.SIGINT in signal.sigpending()
        assert came == []
    assert came == [signal.SIGINT]


@contextmanager
def _noted(number: signal.Signals, came: list[int]) -> Iterator[None]:
    before = signal.signal(number, lambda received, _frame: came.append(received))
    try:
        yield
        assert came == [number]
    finally:
        signal.signal(number, before)
