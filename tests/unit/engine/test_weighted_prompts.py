"""The parser of weighted prompts: what the reference's documentation shows, and what we refuse."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpipeline.engine.weighted_prompts import WeightRefusedError, parse

LESS = 1 / 1.1


def parts(text: str) -> list[list[tuple[str, Any]]]:
    return [[(part.text, pytest.approx(part.weight)) for part in section] for section in parse(text).sections]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                *[("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55)],
                *[(", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)],
            ],
        ),
        ("[[dim]]", [("dim", LESS * LESS)]),
        ("(a: 1.25 )", [("a", 1.25)]),
        ("(a:.5) (b:+2) (c:3.)", [("a", 0.5), (" ", 1), ("b", 2), (" ", 1), ("c", 3)]),
        ("(gone:0)", [("gone", 0)]),
        ("un(bal:1.0)anced", [("unbalanced", 1)]),
        ("a:1.3)", [("a:1.3)", 1)]),
        (r"back\\slash \x", [("back\\slash x", 1)]),
        ("()[]", []),
        ("", [("", 1)]),
    ],
)
def test_parts_and_weights_are_the_references(text: str, wanted: list[tuple[str, float]]) -> None:
    assert parts(text) == [wanted]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a BREAK b", [[("a", 1)], [("b", 1)]]),
        ("(a\nBREAK b:1.3) c", [[("a", 1.3)], [("b", 1.3), (" c", 1)]]),
        ("BREAK a BREAK BREAK", [[], [("a", 1)], [], []]),
        ("BREAKING BREAK_IN", [[("BREAKING BREAK_IN", 1)]]),
    ],
)
def test_break_starts_a_section(text: str, wanted: list[list[tuple[str, float]]]) -> None:
    assert parts(text) == wanted


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "1e9", "1e-3", "", " ", "-1", "5.01", "1,3", "1.2.3", "0x2"])
def test_a_bad_weight_is_refused_with_its_place(weight: str) -> None:
    with pytest.raises(WeightRefusedError, match=r"^at character 9, in '.*a weight"):
        parse(f"a red (b:{weight}) square")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("(" * 10_000, "at character 51, .*more than 50 brackets are open"),
        ("([" * 5_000, "at character 51, .*more than 50 brackets are open"),
        ("((a:5))", "at character 3, .*multiply to a weight of 5.5; the highest weight is 5"),
        ("(" * 17 + "a" + ")" * 17, "at character 18, .*multiply to a weight of 5.054"),
        ("BREAK " * 64, "more than 63 BREAK"),
    ],
)
def test_what_brackets_cannot_mean_is_refused(text: str, why: str) -> None:
    with pytest.raises(WeightRefusedError, match=why):
        parse(text)


@pytest.mark.parametrize(
    ("text", "doubts"),
    [
        ("(a", [("unbalanced", 0)]),
        ("a) [b", [("unbalanced", 1), ("unbalanced", 3)]),
        ("(note: red)", [("not-a-weight", 5)]),
        ("(a:1.2) [b] \\(", []),
    ],
)
def test_what_is_probably_not_meant_is_a_doubt(text: str, doubts: list[tuple[str, int]]) -> None:
    assert [(doubt.kind, doubt.position) for doubt in parse(text).doubts] == doubts


@given(st.text(alphabet="ab ()[]\\:.1-BREAK", max_size=60))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        found = parse(text)
    except WeightRefusedError:
        return
    assert all(0 <= weight <= 5 for weight in found.weights)
    assert not set(found.text) - set(text) - {" "}


@pytest.mark.parametrize("piece", ["(a)", "((((((((a))))))))", ":", "(a:1.2)", "[", "]", "\\", "a(b"])
def test_the_longest_prompt_is_parsed_in_time(piece: str) -> None:
    began = time.process_time()
    with suppress(WeightRefusedError):
        parse(piece * (20_000 // len(piece)))
    assert time.process_time() - began < 2
