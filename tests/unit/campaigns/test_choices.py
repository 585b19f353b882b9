"""`exclude:` and `include:`: combinations removed from the product, and added to it."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpipeline.campaigns import expand
from tests.factories import campaign_of, input_folder, jobs_of, mistakes_of

GRID = """
    variables: {{colour: [red, blue], ground: [white, black], zip: {{size: [8, 16], word: [small, large]}}}}
    {choices}
    stages: [{{id: a, task: text-to-image, prompt: "{{{{ colour }}}} {{{{ ground }}}} {{{{ word }}}} {{{{ size }}}}"}}]
"""


def prompts(choices: str) -> list[str]:
    return [job.request.prompt for job in jobs_of(GRID.format(choices=choices))]


def test_an_excluded_combination_is_not_made() -> None:
    found = prompts("exclude: [{colour: red, ground: black, size: 8}]")
    assert len(found) == 7
    assert "red black small 8" not in found


def test_an_exclusion_that_names_fewer_variables_takes_all_that_match() -> None:
    assert prompts("exclude: [{colour: red}]") == [text for text in prompts("") if text.startswith("blue")]


def test_an_included_combination_is_made_beside_the_product_although_it_is_in_no_list() -> None:
    assert prompts("include: [{colour: green, ground: white, size: 99, word: huge}]")[8:] == ["green white huge 99"]


def test_what_is_included_and_already_there_is_made_once() -> None:
    again = "include: [{colour: red, ground: white, size: 8, word: small}]"
    assert sorted(prompts(again)) == sorted(prompts(""))


def test_what_is_included_is_made_although_it_is_excluded() -> None:
    choices = """exclude: [{colour: red}]
    include: [{colour: red, ground: white, size: 8, word: small}]"""
    assert [text for text in prompts(choices) if text.startswith("red")] == ["red white small 8"]


def test_a_row_is_excluded_by_its_cells_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "products.csv").write_text("sku,stock\n007,0\n8,12\n")
    text = """
        variables: {rows: {file: products.csv, key: sku}, ground: [white, black]}
        exclude: [{sku: "007", ground: black}, {stock: 12}]
        stages: [{id: a, task: text-to-image, prompt: "{{ sku }} {{ ground }}"}]
    """
    assert [job.request.prompt for job in jobs_of(text, tmp_path)] == ["007 white"]


def test_one_and_true_and_a_text_are_different_values() -> None:
    text = """
        variables: {x: [1, true, "1"]}
        exclude: [{x: true}]
        stages: [{id: a, task: text-to-image, prompt: "{{ x }}"}]
    """
    assert [dict(job.variables)["x"] for job in jobs_of(text)] == [1, "1"]


def test_including_one_does_not_bring_back_true() -> None:
    text = """
        variables: {x: [2, true]}
        exclude: [{x: true}]
        include: [{x: 1}]
        stages: [{id: a, task: text-to-image, prompt: "{{ x }}"}]
    """
    assert [dict(job.variables)["x"] for job in jobs_of(text)] == [2, 1]


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ("exclude: [{color: red}]", "exclude[0].color: the variable 'color' is not declared (did you mean 'colour'?)"),
        ("exclude: [{colour: rod}]", "exclude[0].colour: colour is never 'rod' (did you mean 'red'?)"),
        ("exclude: [{size: '8'}]", "exclude[0].size: size is never '8' (did you mean '8'?)"),
        ("exclude: [{}]", "exclude[0]: names no variable (write {colour: red})"),
        ("exclude: [{colour: [red]}]", "exclude[0].colour: found a list, expected a text, a number, true or false"),
        ("include: [{colour: green}]", "include[0]: has no value for ground, size, word"),
        (
            "include: [{colour: green, ground: white, size: 9, word: x, form: y}]",
            "include[0].form: 'form' is not a variable with a list of values",
        ),
    ],
)
def test_a_choice_that_chooses_nothing_is_refused(choices: str, expected: str) -> None:
    (mistake,) = mistakes_of(GRID.format(choices=choices))
    assert expected in mistake


@st.composite
def chosen(draw: st.DrawFn) -> tuple[dict[str, list[int]], list[dict[str, int]], list[dict[str, int]]]:
    """Lists of variables, combinations excluded from their product, and combinations added to it."""
    lists = {name: list(range(draw(st.integers(1, 4)))) for name in "abc"[: draw(st.integers(1, 3))]}
    one_of_each = st.fixed_dictionaries({name: st.integers(0, 5) for name in lists})
    part = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in lists.items()})
    excluded = draw(st.lists(part.filter(bool), max_size=3))
    return lists, excluded, draw(st.lists(one_of_each, max_size=3))


@settings(max_examples=80)
@given(chosen())
def test_any_choice_makes_the_product_less_the_excluded_with_the_included_each_once(
    case: tuple[dict[str, list[int]], list[dict[str, int]], list[dict[str, int]]],
) -> None:
    lists, excluded, included = case
    prompt = " ".join(f"{{{{ {name} }}}}" for name in lists)
    stages = [{"id": "a", "task": "text-to-image", "prompt": f"x {prompt}"}]
    document: dict[str, Any] = {"variables": lists, "exclude": excluded, "include": included, "stages": stages}
    text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in document.items())
    whole = [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]
    kept = [one for one in whole if not any(part.items() <= one.items() for part in excluded)]
    expected = {tuple(sorted(one.items())) for one in [*kept, *included]}
    jobs = jobs_of(text)
    assert sorted(job.axes for job in jobs) == sorted(expected)
    campaign = campaign_of(text)
    assert expand.check(campaign, input_folder(campaign.folder)) == len(jobs)
