from __future__ import annotations

from typing import Any

import pytest

from sdpipeline.campaigns import filenames
from sdpipeline.campaigns.filenames import Subject, WrongNameError


def subject(**changes: Any) -> Subject:
    fields: dict[str, Any] = {"id": 7, "stage": "final", "row": "C-001", "seed": 3, "edition": "", "extension": "png"}
    axes = changes.pop("axes", {})
    variables = axes | changes.pop("variables", {})
    return Subject(**{**fields, "axes": axes, "variables": variables, **changes})


def templated(text: str, **changes: Any) -> str:
    return filenames.by_template(text)(subject(**changes))


def default(*, keyed: bool = True, stage_folders: bool = False, **changes: Any) -> str:
    return filenames.by_default(keyed=keyed, stage_folders=stage_folders)(subject(**changes))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ colour }}-{{ seed }}", "red-3.png"),
        ("{{ stage }}/{{ row }}", "final/C-001.png"),
        ("{{ id }}{{ edition }}", "7.png"),
        ("{{ colour|upper }}.PNG", "RED.PNG"),
        ("Größe {{ colour }}", "Größe red.png"),
    ],
)
def test_a_template_uses_variables_and_what_a_job_is(text: str, expected: str) -> None:
    assert templated(text, variables={"colour": "red"}) == expected


def test_a_campaigns_own_variable_is_what_its_author_means_by_a_word() -> None:
    assert templated("{{ id }}", variables={"id": "article-9"}) == "article-9.png"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("../x", "is not a path inside the folder"),
        ("a/../../x", "is not a path inside the folder"),
        ("/etc/passwd", "is not a path inside the folder"),
        ("a//b", "is not a path inside the folder"),
        ("", "begins or ends with a dot or a space"),
        (".hidden", "begins or ends with a dot or a space"),
        ("folder /x", "begins or ends with a dot or a space"),
        ("a\nb", "holds a control character"),
        ("a\x7fb", "holds a control character"),
        ("a\u202eb", "holds a control character"),
        ("C:\\x", "holds the character :"),
        ("..\\x", "holds the character \\"),
        ("what?", "holds the character ?"),
        ("con", "is a reserved name on Windows"),
        ("LPT1/x", "is a reserved name on Windows"),
        ("x" * 252, "is longer than 255 bytes"),
        ("ä" * 126, "is longer than 255 bytes"),
        ("a/" * 600 + "x", "is longer than 255 bytes"),
        ("a.png/b", "has a folder with the name of a file"),
        ("Manifest.csv/b", "has a folder with the name of a file"),
    ],
)
def test_a_name_that_leaves_the_folder_or_that_some_machine_cannot_hold_is_refused(value: str, why: str) -> None:
    with pytest.raises(WrongNameError, match="for job 7") as refused:
        templated("{{ value }}", variables={"value": value})
    assert why in str(refused.value)


def test_an_unknown_variable_is_named_with_the_nearest_there_is() -> None:
    with pytest.raises(WrongNameError, match="job 7 of stage 'final' has no variable 'color'") as refused:
        templated("{{ color }}", variables={"colour": "red"})
    assert refused.value.fix == "did you mean 'colour'?"


@pytest.mark.parametrize("text", ["{{ ''.__class__ }}", "{% for x in row %}{% endfor %}", "{{ row"])
def test_a_template_is_held_to_the_same_sandbox_as_a_prompt(text: str) -> None:
    with pytest.raises(WrongNameError):
        filenames.by_template(text)


def test_without_a_template_a_keyed_row_is_called_by_its_key_its_axes_and_its_seed() -> None:
    assert default(axes={"ground": "white"}, variables={"colour": "red"}) == "C-001-white-3.png"


def test_without_a_template_a_row_that_has_no_key_is_called_by_its_values_too() -> None:
    name = default(keyed=False, row="0123456789abcdef", axes={"ground": "white"}, variables={"colour": "red"})
    assert name == "red-0123456789abcdef-white-3.png"


def test_editions_and_several_stages_get_folders_of_their_own() -> None:
    assert default(edition="2026-11-25", stage_folders=True) == "2026-11-25/final/C-001-3.png"


@pytest.mark.parametrize(
    "value", ["../../x", "a/b\\c", "  ", "a\0b", "CON", "x" * 9000, "ä" * 9000, "nul.txt", "a:b", "…"]
)
def test_whatever_a_value_is_a_default_name_may_be_written_anywhere(value: str) -> None:
    name = default(row=value, axes={"prompt": value, "other": True})
    assert filenames.refusal(name) is None
    assert "/" not in name
    assert filenames.refusal(filenames.numbered(name, 2**63)) is None


def test_a_numbered_name_is_no_other_jobs_default_name() -> None:
    assert filenames.numbered("a.b.png", 12) == "a.b~12.png"
    assert "~" not in default(row="a~12")


def test_what_tells_two_pictures_apart_is_told_with_their_variables_first() -> None:
    one = subject(axes={"colour": "red", "draft.seed": 1}, variables={"shape": "star"})
    other = subject(id=8, seed=4, axes={"colour": "blue", "draft.seed": 2}, variables={"shape": "star"})
    assert filenames.different(one, other) == ["colour", "seed", "id"]
