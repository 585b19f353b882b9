from __future__ import annotations

import random

import pytest

from sdpipeline.domain import Status
from sdpipeline.errors import (
    BadPictureError,
    DatabaseUnavailableError,
    DeviceExhaustedError,
    InputImageError,
    PictureBlockedError,
    RequestRefusedError,
    SdpError,
    StorageUnavailableError,
)
from sdpipeline.worker.retry import FIRST_BACKOFF_S, LONGEST_BACKOFF_S, backoff_s, next_status


@pytest.mark.parametrize("error", [StorageUnavailableError, DatabaseUnavailableError, DeviceExhaustedError])
def test_what_may_pass_is_tried_again_until_the_last_attempt(error: type[SdpError]) -> None:
    statuses = [next_status(error("away"), attempt=attempt, max_attempts=3) for attempt in (1, 2, 3)]
    assert statuses == [Status.WAITING, Status.WAITING, Status.FAILED]


def test_what_a_policy_forbids_is_blocked_at_once() -> None:
    assert (
        next_status(PictureBlockedError("policy.safety_checker: 'nsfw'"), attempt=1, max_attempts=3) is Status.BLOCKED
    )


@pytest.mark.parametrize("error", [RequestRefusedError, InputImageError, BadPictureError])
def test_what_would_fail_again_fails_at_once(error: type[SdpError]) -> None:
    assert next_status(error("wrong"), attempt=1, max_attempts=3) is Status.FAILED


def test_the_wait_doubles_with_jitter_up_to_a_limit() -> None:
    chance = random.Random(0)
    for attempt in range(1, 40):
        ceiling = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (attempt - 1))
        assert ceiling / 2 <= backoff_s(attempt, chance) <= ceiling


def test_jobs_that_failed_together_do_not_come_back_together() -> None:
    chance = random.Random(0)
    assert len({backoff_s(3, chance) for _ in range(100)}) == 100


def test_any_number_of_attempts_has_a_wait() -> None:
    assert backoff_s(5000, random.Random(0)) <= LONGEST_BACKOFF_S
