"""Retry of a database call until the database is available."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import structlog

from sdpipeline.backoff import Backoff, retry
from sdpipeline.errors import DatabaseRefusedError, DatabaseUnavailableError

DATABASE_BACKOFF = Backoff(first_s=0.5, longest_s=30.0)

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)


def until_available(ask: Callable[[], _T], stop: threading.Event | None = None) -> _T:
    """Call ``ask`` until the database is available, with growing pauses; ``ask`` must be safe to repeat.

    Raises DatabaseRefusedError at once, and the last DatabaseUnavailableError if ``stop`` is set meanwhile.
    """
    stopped = stop or threading.Event()

    def wait(error: DatabaseUnavailableError, delay_s: float) -> None:
        if isinstance(error, DatabaseRefusedError):
            raise error
        log_outage(error, delay_s)
        if stopped.wait(delay_s):
            raise error

    return retry(ask, on=DatabaseUnavailableError, backoff=DATABASE_BACKOFF, wait=wait)


def log_outage(error: DatabaseUnavailableError, delay_s: float) -> None:
    """Log an outage of the database and the delay before the next attempt."""
    _log.warning("database_unavailable", error=str(error), fix=error.fix, retry_in_s=round(delay_s, 1))
