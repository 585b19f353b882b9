"""How long things took, as the few numbers that a table shows."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

from sdpipeline.domain import Json

OnProgress = Callable[[int, int], None]
"""Hears how many steps of how many are done."""


class Clock:
    """Notes how long each kind of thing took, from any thread."""

    def __init__(self) -> None:
        self.taken_s: dict[str, list[float]] = defaultdict(list)
        self._lock = threading.Lock()

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Time one thing of that name; one that fails is not counted."""
        started = time.perf_counter()
        yield
        took = time.perf_counter() - started
        with self._lock:
            self.taken_s[name].append(took)

    def figures(self, name: str, *, wall_s: float) -> Json:
        """How many, how many a second of ``wall_s``, and percentiles of each one's time in milliseconds."""
        taken = self.taken_s[name]
        return {
            "what": name,
            "count": len(taken),
            "per_s": round(len(taken) / wall_s, 2) if wall_s else 0.0,
            "p50_ms": round(percentile(taken, 50) * 1e3, 3),
            "p99_ms": round(percentile(taken, 99) * 1e3, 3),
        }


def percentile(values: Sequence[float], percent: int) -> float:
    """The nearest rank; 0 of nothing."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, len(ranked) * percent // 100)] if ranked else 0.0


def middle(values: Sequence[float]) -> float:
    """The median, which one busy moment of the machine does not move."""
    return median(values)
