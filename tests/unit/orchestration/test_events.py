"""Events for automations, and when they are emitted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sdpipeline.db.queries import Progress
from sdpipeline.orchestration.events import CampaignEvent, outcome, status_change


def progress(status: str = "active", because: str | None = None, **counts: int) -> Progress:
    return Progress(
        id=1,
        name="spring",
        version=1,
        status=status,
        counts=counts,
        images=0,
        gpu_seconds=0.0,
        cost=0.0,
        budget=None,
        paused_because=because,
    )


@pytest.mark.parametrize(
    ("before", "now", "event"),
    [
        ("active", progress(ready=1), None),
        (None, progress(ready=1), None),
        ("active", progress("paused", ready=1), CampaignEvent.PAUSED),
        ("active", progress("paused", "max_images: 5", ready=1), CampaignEvent.BUDGET_SPENT),
        (None, progress("paused", "max_images: 5", ready=1), CampaignEvent.BUDGET_SPENT),
        ("paused", progress("paused", "max_images: 5", ready=1), None),
        ("paused", progress(ready=1), CampaignEvent.RESUMED),
        ("active", progress("paused", succeeded=1), None),
        ("paused", progress("finished", succeeded=1), None),
    ],
)
def test_a_pause_is_told_once_and_so_is_its_end(before: str | None, now: Progress, event: CampaignEvent | None) -> None:
    assert status_change(before, now) == event


@pytest.mark.parametrize(
    ("counts", "event"),
    [
        ({"succeeded": 4}, CampaignEvent.FINISHED),
        ({"succeeded": 4, "cancelled": 1}, CampaignEvent.FINISHED),
        ({"succeeded": 4, "failed": 1}, CampaignEvent.FAILED),
        ({"succeeded": 4, "blocked": 1}, CampaignEvent.FAILED),
        ({"succeeded": 4, "ready": 1}, None),
    ],
)
def test_a_run_that_leaves_nothing_to_do_says_how_it_went(counts: dict[str, int], event: CampaignEvent | None) -> None:
    assert outcome(replace(progress(), counts=counts)) == event
