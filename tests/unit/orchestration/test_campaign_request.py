"""The campaign flow's request form: accepted and refused values."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from sdpipeline.orchestration.campaign_request import EVERYTHING, CampaignRequest


@pytest.mark.parametrize(
    ("asked", "called"),
    [
        ({"campaign": "spring"}, "spring"),
        ({"file": "s3://bucket/spring.yaml"}, "s3://bucket/spring.yaml"),
        ({"text": "name: spring"}, "a campaign's text"),
        ({}, "all campaigns"),
    ],
)
def test_a_run_is_called_by_what_it_was_asked_for(asked: dict[str, Any], called: str) -> None:
    assert str(CampaignRequest(**asked)) == called


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"campaign": "spring", "text": "name: spring"}, "give only one of campaign and text"),
        ({"campaign": "spring", "prune": True}, "prune needs file or text"),
        ({"campaign": "spring", "edition": "2026-11-25"}, "edition needs file or text"),
        ({"campaign": "Spring"}, "campaign"),
        ({"file": "/etc/passwd"}, "file"),
        ({"min_workers": 0}, "greater than or equal to 1"),
        ({"reopen": "failed"}, "reopen: needs one of"),
        ({"min_workers": 1, "max_workers": 2}, "min_workers and max_workers: needs one of"),
        ({"campaign": "spring", "min_workers": 3, "max_workers": 2}, "min_workers is more than max_workers"),
        ({"reopen": "everything"}, "'nothing', 'failed', 'blocked' or 'cancelled'"),
        ({"campain": "spring"}, "campain"),
    ],
)
def test_what_cannot_be_meant_is_refused(asked: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        CampaignRequest(**asked)


def test_a_schedule_holds_only_what_was_asked_for() -> None:
    assert EVERYTHING.document() == {}
    assert CampaignRequest(campaign="spring", max_workers=2).document() == {"campaign": "spring", "max_workers": 2}
