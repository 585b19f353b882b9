"""Retry policy: status and back-off of a job after a failed attempt."""

from __future__ import annotations

from sdpipeline.backoff import Backoff
from sdpipeline.domain import Status
from sdpipeline.errors import PermanentError, PictureBlockedError, SdpError

JOB_BACKOFF = Backoff(first_s=2.0, longest_s=300.0)
"""Delay before the next attempt of a job."""


def retry_delay_s(attempt: int) -> float:
    """Return the seconds that a job waits after this failed attempt, which counts from 1."""
    return JOB_BACKOFF.delay_s(attempt)


def next_status(error: SdpError, *, attempt: int, max_attempts: int) -> Status:
    """Return ``blocked`` if a policy forbids the picture, and ``failed`` for any other permanent error or the last
    attempt.

    Otherwise return ``waiting``: the job is tried again.
    """
    if isinstance(error, PictureBlockedError):
        return Status.BLOCKED
    if isinstance(error, PermanentError) or attempt >= max_attempts:
        return Status.FAILED
    return Status.WAITING
