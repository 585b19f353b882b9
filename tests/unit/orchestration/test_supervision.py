"""Rules for counting workers as dead, restarting them and giving up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sdpipeline.db.queries import Progress
from sdpipeline.orchestration.supervision import MAX_RESTARTS, Restarts, left_work, worker_needed
from tests.factories import progress

READY = progress(ready=4, succeeded=2)
WAITING = progress(waiting=4, succeeded=2)
PAUSED = replace(progress(ready=4, leased=1, succeeded=2), status="paused")


@pytest.mark.parametrize(
    ("now", "started_at", "died"),
    [(READY, 2, True), (READY, 1, False), (WAITING, 2, False), (progress(), 0, False), (PAUSED, 2, False)],
)
def test_a_worker_that_ended_in_order_died_only_if_it_left_ready_jobs_untouched(
    now: Progress, started_at: int, *, died: bool
) -> None:
    assert left_work(now, finished_at_start=started_at) is died


@pytest.mark.parametrize(
    ("now", "alone", "needed"),
    [(READY, False, True), (WAITING, False, False), (WAITING, True, True), (progress(succeeded=3), True, False)],
)
def test_jobs_that_are_not_ready_need_one_worker_only(now: Progress, *, alone: bool, needed: bool) -> None:
    assert worker_needed(now, alone=alone) is needed


@pytest.mark.parametrize("alone", [False, True])
def test_a_paused_campaign_needs_no_new_worker(*, alone: bool) -> None:
    assert not worker_needed(PAUSED, alone=alone)


def test_restarts_are_bounded_for_each_worker_and_a_reset_allows_them_again() -> None:
    restarts = Restarts()
    for _ in range(MAX_RESTARTS):
        restarts.record_exit()
    assert not restarts.exhausted()
    restarts.record_exit()
    assert restarts.exhausted()
    assert not restarts.exhausted(workers=2)
    restarts.reset()
    assert not restarts.exhausted()
