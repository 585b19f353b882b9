"""Disclosure: how much of a record is embedded in a picture, and where a campaign configures it."""

from __future__ import annotations

import pytest

from sdpipeline.campaigns.submission import delivery_rules
from sdpipeline.domain import Json, hashed
from sdpipeline.provenance import disclosed, discloses_more, own_part
from tests.factories import campaign_of, jobs_of, mistakes_of

TOLD = """
    stages: [{{id: draft, task: text-to-image, prompt: a circle}}]
    {provenance}
"""


def record(told: str | None = None, **more: Json) -> Json:
    asked = {"prompt": "a circle", "negative_prompt": "blurry", "seed": 1}
    return {"asked": asked} | ({"include_prompt": told} if told else {}) | more


def test_in_full_a_record_is_embedded_as_it_is() -> None:
    assert disclosed(record(ancestors={"ab": record()})) == record(ancestors={"ab": record()})


@pytest.mark.parametrize(
    ("told", "prompts"),
    [
        ("hash", {"prompt_sha256": hashed(b"a circle"), "negative_prompt_sha256": hashed(b"blurry")}),
        ("none", {}),
    ],
)
def test_a_record_and_all_its_ancestors_keep_their_prompts_back(told: str, prompts: Json) -> None:
    nested = {"image": {"stage": "draft", "record": record()}}
    found = disclosed(record(told, ancestors={"ab": record(), "cd": record(inputs=nested)}))
    inner = found["ancestors"]["cd"]["inputs"]["image"]["record"]
    for each in (found, *found["ancestors"].values(), inner):
        assert each["asked"] == {"seed": 1} | prompts
        assert each["include_prompt"] == told


def test_what_an_ancestor_kept_back_stays_so_whatever_its_descendant_tells() -> None:
    for kept in (record("none"), disclosed(record("none"))):
        for told in ("full", "hash"):
            assert disclosed(record(told, ancestors={"ab": kept}))["ancestors"]["ab"]["asked"] == {"seed": 1}
    hashes = disclosed(record("hash"))
    assert disclosed(record("none", ancestors={"ab": hashes}))["ancestors"]["ab"]["asked"] == {"seed": 1}


def test_what_is_signed_with_a_picture_leaves_its_ancestors_to_their_own_signatures() -> None:
    assert own_part(record(ancestors={"ab": record()})) == record()


def test_full_tells_more_than_a_hash_and_that_more_than_nothing() -> None:
    ways = ("full", "hash", "none")
    assert [(one, other) for one in ways for other in ways if discloses_more(one, other)] == [
        ("full", "hash"),
        ("full", "none"),
        ("hash", "none"),
    ]


def test_a_campaign_says_what_its_pictures_tell_and_changes_no_fingerprint() -> None:
    plain, closed = (TOLD.format(provenance=each) for each in ("", "provenance: {include_prompt: hash}"))
    assert delivery_rules(campaign_of(plain))["draft"].include_prompt == "full"
    assert delivery_rules(campaign_of(closed))["draft"].include_prompt == "hash"
    assert [job.fingerprint for job in jobs_of(plain)] == [job.fingerprint for job in jobs_of(closed)]


def test_another_word_is_refused_with_those_there_are() -> None:
    (mistake,) = mistakes_of(TOLD.format(provenance="provenance: {include_prompt: some}"))
    assert "provenance.include_prompt: found 'some'" in mistake
    assert "hash" in mistake
