"""Retry of a database call until the database is available."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import structlog

from sdpipeline.errors import DatabaseRefusedError, DatabaseUnavailableError

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)


def until_available(ask: Callable[[], _T], stop: threading.Event | None = None) -> _T:
    """Call ``ask`` until the database is available, with growing pauses; ``ask`` must be safe to repeat.

    Raises DatabaseRefusedError at once, and the last DatabaseUnavailableError if ``stop`` is set meanwhile.
    """
    pause_s, stopped = FIRST_PAUSE_S, stop or threading.Event()
    while True:
        try:
            return ask()
        except DatabaseRefusedError:
            raise
        except DatabaseUnavailableError as error:
            _log.warning("database_unavailable", error=str(error), fix=error.fix, retry_in_s=pause_s)
            if stopped.wait(pause_s):
                raise
            pause_s = min(LONGEST_PAUSE_S, pause_s * 2)
