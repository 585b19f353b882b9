"""Delivery rules and their stored form, which earlier releases also read and write."""

from __future__ import annotations

import json

import pytest

from sdpipeline.domain import CheckpointRef
from sdpipeline.jobs import DeliveryRules, QualityThresholds, SafetyCheck

CHECK = SafetyCheck(rule="policy.safety_checker: 'nsfw'", checker=CheckpointRef(alias="nsfw", digest="d1"))

STORED = {
    '{"reuse": true, "quality": {}}': DeliveryRules(),
    '{"reuse": false, "quality": {"min_sharpness": 10.0, "min_edge_agreement": 0.5}}': DeliveryRules(
        reuse=False, quality=QualityThresholds(min_sharpness=10.0, min_edge_agreement=0.5)
    ),
    (
        '{"reuse": true, "quality": {}, "safety": [{"rule": "policy.safety_checker: \'nsfw\'", "alias": "nsfw",'
        ' "digest": "d1"}], "include_prompt": "hash"}'
    ): DeliveryRules(safety=(CHECK,), include_prompt="hash"),
}


@pytest.mark.parametrize(("text", "rules"), STORED.items())
def test_rules_are_stored_byte_for_byte_as_in_the_previous_release(text: str, rules: DeliveryRules) -> None:
    assert json.dumps(rules.to_document()) == text
    assert DeliveryRules.from_document(json.loads(text)) == rules


def test_a_row_without_rules_has_the_defaults() -> None:
    assert DeliveryRules.from_document({}) == DeliveryRules()


def test_keys_of_a_newer_release_are_ignored() -> None:
    assert DeliveryRules.from_document({"quality": {"min_beauty": 1.0}, "watermark": True}) == DeliveryRules()
