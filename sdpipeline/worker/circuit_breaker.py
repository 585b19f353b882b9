"""Circuit breaker: pause a worker after repeated failures, then probe with single jobs."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from sdpipeline.backoff import Backoff

FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0


@dataclass(slots=True, kw_only=True)
class CircuitBreaker:
    """Open after ``max_failures`` consecutive failures that no job caused.

    While it is open, one job is tried alone after each pause. A failure doubles the pause; a success closes the
    breaker.
    """

    max_failures: int = 5
    first_pause_s: float = FIRST_PAUSE_S
    failures: int = 0
    _ends_at: float = 0.0
    _counting: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_open(self) -> bool:
        """Return True while the worker is paused."""
        return self.failures >= self.max_failures

    @property
    def is_resting(self) -> bool:
        """Return True while the pause lasts, so that no job may be tried yet."""
        return self.is_open and time.monotonic() < self._ends_at

    def failed(self) -> float | None:
        """Count a failure; return the seconds of the pause it causes, or None if the breaker stays closed."""
        with self._counting:
            self.failures += 1
            if not self.is_open:
                return None
            pauses = Backoff(first_s=self.first_pause_s, longest_s=LONGEST_PAUSE_S)
            pause_s = pauses.delay_s(1 + self.failures - self.max_failures)
            self._ends_at = time.monotonic() + pause_s
            return pause_s

    def succeeded(self) -> bool:
        """Reset the failure count; return True if the breaker was open."""
        with self._counting:
            was_open, self.failures = self.is_open, 0
            return was_open
