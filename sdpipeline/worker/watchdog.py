"""Watchdog thread that ends the process when a batch hangs or a shutdown takes too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sdpipeline.shutdown import Stop

HUNG_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the supervisor of the process restarts it."""

MIN_TIMEOUT_S = 600.0
TIMES_AS_LONG = 20.0
LOOK_S = 0.1


@dataclass(slots=True)
class BatchTimings:
    """Longest batch duration per group, from which the batch timeout follows; ``timeout_s`` from the settings
    overrides it."""

    timeout_s: float = 0.0
    _longest_s: dict[int, float] = field(default_factory=dict)

    def allowed_s(self, group_id: int) -> float:
        """Return the timeout of a batch of this group; the first batch's timeout includes loading the checkpoint."""
        return self.timeout_s or max(MIN_TIMEOUT_S, TIMES_AS_LONG * self._longest_s.get(group_id, 0.0))

    def took(self, group_id: int, seconds: float) -> None:
        """Record the duration of a finished batch."""
        self._longest_s[group_id] = max(seconds, self._longest_s.get(group_id, 0.0))


class Watchdog:
    """Call ``late`` if the shutdown exceeds ``grace_s`` or must be immediate, and ``hung`` if a batch exceeds its
    timeout."""

    def __init__(
        self, stop: threading.Event, grace_s: float, *, late: Callable[[], object], hung: Callable[[], object]
    ) -> None:
        self._stop = stop
        self._grace_s = grace_s
        self._late = late
        self._hung = hung
        self._hung_at: float | None = None
        self._done = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs."""
        thread = threading.Thread(target=self._watch, name="sdp-watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    @contextmanager
    def batch(self, allowed_s: float) -> Iterator[None]:
        """Apply the timeout ``allowed_s`` to one batch, which runs inside the block."""
        self._hung_at = time.monotonic() + allowed_s
        try:
            yield
        finally:
            self._hung_at = None

    def _watch(self) -> None:
        leave_at: float | None = None
        while not self._done.wait(LOOK_S):
            now, hung_at = time.monotonic(), self._hung_at
            if self._stop.is_set() and leave_at is None:
                leave_at = now + self._grace_s
            if (leave_at is not None and now >= leave_at) or (isinstance(self._stop, Stop) and self._stop.at_once):
                self._late()
                return
            if hung_at is not None and now >= hung_at:
                self._hung()
                return
