"""Retry policy: status and back-off of a job after a failed attempt."""

from __future__ import annotations

import random

from sdpipeline.domain import Status
from sdpipeline.errors import PermanentError, PictureBlockedError, SdpError

FIRST_BACKOFF_S = 2.0
LONGEST_BACKOFF_S = 300.0


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


def backoff_s(attempt: int, random_source: random.Random) -> float:
    """Return the seconds before attempt ``attempt + 1``: exponential back-off with full jitter.

    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    ceiling = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(attempt - 1, 30))
    return random_source.uniform(ceiling / 2, ceiling)
