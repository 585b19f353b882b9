"""Selection of a stage's profile."""

from __future__ import annotations

import pytest

from sdpipeline.domain import request_from_document, to_document
from sdpipeline.errors import CampaignError
from tests.factories import CATALOG, checkpoint_files, jobs_of

WEIGHTS = CATALOG | {
    files.alias: files
    for files in (
        checkpoint_files("gan", family="gan-upscale", scale=4),
        checkpoint_files("flow", family="sd3"),
    )
}
STAGES = """
defaults: {{width: 64, height: 64}}
stages:
  - {{id: draft, task: text-to-image, prompt: a circle{draft}}}
  - {{id: final, task: image-to-image, prompt: a circle, image: {{stage: draft}}{final}}}
"""


def _chosen(campaign: str = "", draft: str = "", final: str = "") -> dict[str, tuple[str, str]]:
    text = f"{campaign}\n" + STAGES.format(draft=draft, final=final)
    found = {job.stage: job.request for job in jobs_of(text, catalog=WEIGHTS)}
    assert all(request_from_document(to_document(request)) == request for request in found.values())
    return {stage: (request.reproducibility, request.profile) for stage, request in found.items()}


def _mistakes(campaign: str = "", draft: str = "") -> list[str]:
    with pytest.raises(CampaignError) as raised:
        _chosen(campaign, draft)
    return [str(mistake).split(": ", 1)[1] for mistake in raised.value.mistakes]


@pytest.mark.parametrize(
    ("campaign", "draft", "chosen"),
    [
        ("", "", ("tolerant", "exact")),
        ("profile: exact", "", ("tolerant", "exact")),
        ("profile: turbo", "", ("tolerant", "turbo")),
        ("profile: turbo", ", profile: fast", ("tolerant", "fast")),
        ("", ", profile: turbo", ("tolerant", "turbo")),
        ("reproducibility: strict", "", ("strict", "exact")),
        ("profile: turbo", ", reproducibility: strict", ("strict", "exact")),
        ("reproducibility: strict", ", reproducibility: tolerant, profile: fast", ("tolerant", "fast")),
        ("profile: turbo", ", checkpoint: flow", ("tolerant", "fast")),
    ],
)
def test_the_narrower_word_counts_as_far_as_the_checkpoint_can(
    campaign: str, draft: str, chosen: tuple[str, str]
) -> None:
    assert _chosen(campaign, draft)["draft"] == chosen


def test_a_campaigns_profile_passes_over_stages_that_have_no_use_for_it() -> None:
    text = (
        "profile: turbo\n"
        + STAGES.format(draft="", final="")
        + "  - {id: large, task: super-resolution, checkpoint: gan, image: {stage: final}}\n"
    )
    assert {job.stage: job.request.profile for job in jobs_of(text, catalog=WEIGHTS)} == {
        "draft": "turbo",
        "final": "turbo",
        "large": "exact",
    }


@pytest.mark.parametrize(
    ("campaign", "draft", "mistake"),
    [
        ("profile: quick", "", "profile: found 'quick' (there are exact, fast, turbo)"),
        ("reproducibility: fast", "", "found 'fast' (write profile: fast, and leave reproducibility out)"),
        ("", ", reproducibility: fast", "found 'fast' (write profile: fast, and leave reproducibility out)"),
        (
            "reproducibility: strict\nprofile: fast",
            "",
            "'fast' is not strict (write exact, or reproducibility: tolerant)",
        ),
        ("reproducibility: strict", ", profile: turbo", "'turbo' is not strict (write exact, or reproducibility: tole"),
        ("", ", checkpoint: flow, profile: turbo", "Stable Diffusion 3 gains nothing from 'turbo' (use exact or fast)"),
    ],
)
def test_wishes_that_contradict_each_other_are_refused(campaign: str, draft: str, mistake: str) -> None:
    found = _mistakes(campaign, draft)
    assert any(mistake in each for each in found), found
