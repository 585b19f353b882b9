"""Shared parts of a run's stages: the end of the run, and the queues between stages."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from sdpipeline.worker.held_leases import LeaseWork

QUEUE_POLL_S = 0.25


class RunEnded(Exception):  # noqa: N818 -- unwinds a stage; never leaves this package
    """The run is over: whatever this stage waits for will not come."""


@dataclass(frozen=True, slots=True)
class RunEnd:
    """End of a run: ``stop`` asks for it from outside, ``ended`` is set when a stage failed or all are done."""

    stop: threading.Event
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def is_near(self) -> bool:
        """Return True if no more work may begin."""
        return self.stop.is_set() or self.ended.is_set()

    def run_stage(self, stage: Callable[[], None]) -> None:
        """Run one stage; if it fails, the others stop waiting for it."""
        try:
            stage()
        except RunEnded:
            self.ended.set()
        except BaseException:
            self.ended.set()
            raise

    def pause(self, seconds: float) -> None:
        """Sleep; raises RunEnded if the run ends or is stopped."""
        if self.ended.wait(seconds) or self.stop.is_set():
            raise RunEnded


class StageQueue:
    """Queue of leases between two stages; ``None`` is the last item. Waiting ends with the run."""

    def __init__(self, maxsize: int, end: RunEnd) -> None:
        self._queue: queue.Queue[LeaseWork | None] = queue.Queue(maxsize)
        self._end = end

    def put(self, work: LeaseWork | None) -> None:
        """Wait for a free place; raises RunEnded."""
        while True:
            if self._end.ended.is_set():
                raise RunEnded
            try:
                return self._queue.put(work, timeout=QUEUE_POLL_S)
            except queue.Full:
                continue

    def take(self) -> LeaseWork | None:
        """Wait for the next item; raises RunEnded."""
        while True:
            try:
                return self._queue.get(timeout=QUEUE_POLL_S)
            except queue.Empty:
                if self._end.ended.is_set():
                    raise RunEnded from None
