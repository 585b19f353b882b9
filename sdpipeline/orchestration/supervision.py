"""Rules of supervision, for local workers and Prefect workers: failed exits, restarts and their limit.

A worker died if it failed, or if it ended in order and left ready jobs untouched. Dead workers are replaced at the next
check, without a back-off: loading the checkpoint delays the new worker anyway, and the number of restarts is bounded.
The leases of a dead local worker are released at once, because its process is known to have ended. The leases of a
dead Prefect worker expire, because its process may still run on another machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdpipeline.db.queries import Progress

MAX_RESTARTS = 3
"""Restarts of a worker that keeps dying."""


@dataclass(slots=True)
class Restarts:
    """Failed exits of one worker, or of several that replace each other, against the limit of restarts."""

    failures: int = 0

    def record_exit(self) -> None:
        """Count a failed exit."""
        self.failures += 1

    def reset(self) -> None:
        """Reset the count: a job has finished since, so that workers of this campaign can work."""
        self.failures = 0

    def exhausted(self, *, workers: int = 1) -> bool:
        """Return True if this many workers have died too often to be started again."""
        return self.failures > MAX_RESTARTS * workers


def left_work(progress: Progress, *, finished_at_start: int) -> bool:
    """Return True if a worker that ended in order left ready jobs and finished none: it counts as dead.

    In a paused campaign there is nothing to do for a worker.
    """
    return _workable(progress) and progress.finished == finished_at_start


def worker_needed(progress: Progress, *, alone: bool) -> bool:
    """Return True if a new worker has something to do; ``alone`` means that no other worker runs.

    Without any worker, jobs that wait for a back-off or an expired lease would wait for ever.
    """
    return _workable(progress) or (alone and progress.remaining > 0)


def _workable(progress: Progress) -> bool:
    return progress.ready > 0 and progress.status != "paused"
