"""Warnings about a campaign file."""

from __future__ import annotations

import pytest

from sdpipeline.campaigns import yaml_source
from sdpipeline.campaigns.warnings import Warnings
from sdpipeline.errors import CampaignError


def test_each_kind_is_recorded_once_per_place_in_the_order_of_the_file() -> None:
    warnings = Warnings(yaml_source.parse("a: 1\nb: 2\n", file="c.yaml"))
    warnings.add(("b",), "odd", "is odd", "write 4")
    for value in (1, 2):
        warnings.add(("a",), "odd", f"is odd ({value})")
    warnings.add(("a",), "small", "is small")
    assert [str(each) for each in warnings.in_order()] == [
        "c.yaml:1:1: a: is odd (1)",
        "c.yaml:1:1: a: is small",
        "c.yaml:2:1: b: is odd (write 4)",
    ]
    with pytest.raises(CampaignError, match="is small"):
        warnings.raise_if_strict(strict=True)
    warnings.raise_if_strict(strict=False)
