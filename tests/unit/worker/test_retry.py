from __future__ import annotations

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
from sdpipeline.worker.retry import next_status


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
