"""Timing statistics for a table: counts, rates and percentiles."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

from sdpipeline.domain import Json

OnProgress = Callable[[int, int], None]
"""Called with the number of steps done and the total."""


class Clock:
    """Timer of named operations, usable from any thread."""

    def __init__(self) -> None:
        self.taken_s: dict[str, list[float]] = defaultdict(list)
        self._lock = threading.Lock()

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Time one operation of that name; a failed one is not counted."""
        started = time.perf_counter()
        yield
        took = time.perf_counter() - started
        with self._lock:
            self.taken_s[name].append(took)

    def figures(self, name: str, *, wall_s: float) -> Json:
        """Return the count, the rate per second of ``wall_s``, and percentiles of the duration in milliseconds."""
        taken = self.taken_s[name]
        return {
            "what": name,
            "count": len(taken),
            "per_s": round(len(taken) / wall_s, 2) if wall_s else 0.0,
            "p50_ms": round(percentile(taken, 50) * 1e3, 3),
            "p99_ms": round(percentile(taken, 99) * 1e3, 3),
        }


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the nearest-rank percentile; 0 if there are no values."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, len(ranked) * percent // 100)] if ranked else 0.0


def middle(values: Sequence[float]) -> float:
    """Return the median, which is robust against one busy moment of the machine."""
    return median(values)
