from __future__ import annotations

import threading

import pytest

from sdpipeline.db.waiting import until_available
from sdpipeline.errors import DatabaseRefusedError, DatabaseUnavailableError


class Database:
    """A database that is unavailable for the first ``failures`` calls; ``stop`` is set during the first."""

    def __init__(self, error: Exception, *, failures: int, stop: threading.Event | None = None) -> None:
        self.calls = 0
        self._error = error
        self._failures = failures
        self._stop = stop

    def __call__(self) -> str:
        self.calls += 1
        if self._stop is not None:
            self._stop.set()
        if self.calls <= self._failures:
            raise self._error
        return "answer"


def test_an_outage_is_waited_out() -> None:
    database = Database(DatabaseUnavailableError("away"), failures=1)
    assert until_available(database) == "answer"
    assert database.calls == 2


def test_a_refusal_is_raised_at_once() -> None:
    database = Database(DatabaseRefusedError("wrong password"), failures=1)
    with pytest.raises(DatabaseRefusedError):
        until_available(database)
    assert database.calls == 1


def test_a_stop_ends_the_wait_without_another_attempt() -> None:
    stop = threading.Event()
    database = Database(DatabaseUnavailableError("away"), failures=1, stop=stop)
    with pytest.raises(DatabaseUnavailableError):
        until_available(database, stop)
    assert database.calls == 1
