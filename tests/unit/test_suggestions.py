"""Suggestions name the most similar known name, or list all known ones."""

from __future__ import annotations

import pytest

from sdpipeline.suggestions import nearest, nearest_name


@pytest.mark.parametrize(
    ("name", "known", "suggestion"),
    [
        ("colur", ["size", "colour"], "did you mean 'colour'?"),
        ("x", ["size", "colour"], "there are colour, size"),
        ("x", ["colour"], "there is only colour"),
        ("x", [], "there are none"),
        ("x", [f"name-{n:02}" for n in range(40)], f"there are {', '.join(f'name-{n:02}' for n in range(30))}, ..."),
    ],
)
def test_a_name_has_a_suggestion(name: str, known: list[str], suggestion: str) -> None:
    assert nearest(name, known) == suggestion


def test_a_lower_cutoff_finds_less_similar_names() -> None:
    assert nearest_name("abcd", ["abxy"]) is None
    assert nearest_name("abcd", ["abxy"], cutoff=0.5) == "abxy"


def test_a_name_of_megabytes_takes_no_time() -> None:
    assert nearest_name("x" * 2**24, ["colour"] * 100) is None
