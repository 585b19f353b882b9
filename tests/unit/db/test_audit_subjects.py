"""Subjects and actors of audit events are parsed in one place, and foreign ones are refused."""

from __future__ import annotations

import pytest

from sdpipeline.db import audit_subjects


def test_subjects_of_jobs_and_campaigns_have_their_ids() -> None:
    assert (audit_subjects.job_id("job:12"), audit_subjects.campaign_id("campaign:3")) == (12, 3)


@pytest.mark.parametrize("subject", ["12", "campaign:12", "job:", "job:x", "", "jobs:12"])
def test_another_subject_is_not_taken_for_a_job(subject: str) -> None:
    with pytest.raises(ValueError, match=r"job|int"):
        audit_subjects.job_id(subject)


@pytest.mark.parametrize(
    ("actor", "worker"),
    [("worker:0f3c sdpipeline/1.0", "0f3c"), ("worker:0f3c", "0f3c"), ("anna@host", None), ("a worker:0f3c", None)],
)
def test_an_actor_is_a_worker_only_by_its_first_word(actor: str, worker: str | None) -> None:
    assert audit_subjects.worker_id(actor) == worker
