from __future__ import annotations

import json

import pytest

from sdpipeline.campaigns import yaml_source
from sdpipeline.errors import CampaignError


def refusals(text: str) -> list[str]:
    try:
        return [str(mistake) for _, mistake in yaml_source.parse(text, file="f.yaml").mistakes]
    except CampaignError as error:
        return [str(mistake) for mistake in error.mistakes]


def test_every_key_and_value_knows_its_line_and_column() -> None:
    located = yaml_source.parse("a: 1\nb:\n  - x\n  - {c: 2}\n", file="f.yaml")
    assert located.places["a",] == (1, 1)
    assert located.places["b", 0] == (3, 5)
    assert located.places["b", 1, "c"] == (4, 6)


def test_a_mistake_about_a_key_that_is_missing_stands_at_what_encloses_it() -> None:
    mistake = yaml_source.parse("a:\n  b: {c: 1}\n", file="f.yaml").mistake(("a", "b", "d"), "is missing")
    assert str(mistake) == "f.yaml:2:3: a.b.d: is missing"


def test_words_that_yaml_1_1_turns_into_other_things_stay_words() -> None:
    data = yaml_source.parse("[no, yes, on, 16:9, 0123, 2026-10-03, 1_000, 0x10]", file="f.yaml").data
    assert data == ["no", "yes", "on", "16:9", "0123", "2026-10-03", "1_000", "0x10"]


def test_a_campaign_may_be_written_as_json_with_its_escapes() -> None:
    assert yaml_source.parse(json.dumps({"prompt": "a \U0001f600\n"}), file="f.yaml").data == {
        "prompt": "a \U0001f600\n"
    }


def test_numbers_booleans_and_null_are_those_of_yaml_1_2() -> None:
    data = yaml_source.parse("[1, -2, +3, 1.5, .5, 1e3, true, FALSE, null, ~, !!str 5, '7']", file="f.yaml").data
    assert data == [1, -2, 3, 1.5, 0.5, 1000.0, True, False, None, None, "5", "7"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: !!python/object/apply:os.system [ls]", "f.yaml:1:4: a: the tag !!python/object/apply:os.system is not"),
        ("a: !custom 1", "f.yaml:1:4: a: the tag !custom is not allowed here"),
        ("a: !!map x", "f.yaml:1:4: a: the tag !!map is not allowed here"),
        ("a: !!binary aGk=", "f.yaml:1:4: a: the tag !!binary is not allowed here"),
        ("a: !!int abc", "f.yaml:1:4: a: 'abc' is not a valid int"),
        ("a: !!bool ''", "f.yaml:1:4: a: '' is not a valid bool"),
        ("a: .nan", "f.yaml:1:4: a: .nan is not a finite number"),
        ("a: -.Inf", "f.yaml:1:4: a: -.Inf is not a finite number"),
        ("a: 1e999", "f.yaml:1:4: a: 1e999 is not a finite number"),
        ("a: 9223372036854775808", "f.yaml:1:4: a: 9223372036854775808 is too large a number"),
        (f"a: {'9' * 6000}", "f.yaml:1:4: a: 9999"),
        ("a: 1\nb: 2\na: 3", "f.yaml:3:1: a: is written twice"),
        ("<<: {a: 1}", "f.yaml:1:1: a key must be a plain word"),
        ("? [a]\n: 1", "f.yaml:1:3: a key must be a plain word"),
        ('a: "\\0"', "f.yaml:1:4: a: holds the character U+0000"),
        ('a: "\\e[31m"', "f.yaml:1:4: a: holds the character U+001B"),
        ('a: "\\ud800"', "f.yaml:1:4: a: holds the character U+D800"),
        ("a: 1\nb: \x07", "f.yaml:2: is not YAML: the character U+0007 is not allowed"),
        ("a: b: c", "f.yaml:1:5: is not YAML: mapping values are not allowed here"),
        ("a: [1", "f.yaml:1:6: is not YAML: while parsing a flow sequence"),
        ("a: *b", "f.yaml:1:4: is not YAML: found undefined alias 'b'"),
        ("--- 1\n--- 2", "f.yaml:2:1: is not YAML: expected a single document in the stream"),
    ],
)
def test_what_is_not_plain_data_is_refused_where_it_stands(text: str, expected: str) -> None:
    (found,) = refusals(text)
    assert found.startswith(expected)


def test_a_second_value_of_a_repeated_key_does_not_win() -> None:
    assert yaml_source.parse("a: 1\na: 2", file="f.yaml").data == {"a": 1}


def test_all_values_that_are_none_are_reported_at_once() -> None:
    assert len(refusals("a: .nan\nb: !!x 1\nc: .inf\na: 1")) == 4


def bomb(depth: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    first = f"a: &a [{', '.join('x' * 9)}]\n"
    return first + "".join(
        f"{letters[n]}: &{letters[n]} [{', '.join(['*' + letters[n - 1]] * 9)}]\n" for n in range(1, depth)
    )


@pytest.mark.timeout(30)
@pytest.mark.parametrize("text", [bomb(10), "a: &a [*a]", "[" * 5000, "- " * 5000, "{a: " * 5000])
def test_a_bomb_is_refused_long_before_memory_or_time_runs_out(text: str) -> None:
    (found,) = refusals(text)
    assert "too many values" in found or "nested too deeply" in found


def test_a_long_list_ends_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_source, "MAX_NODES", 100)
    assert refusals(f"a: [{'x, ' * 200}]") == ["f.yaml:1:296: has too many values (put the rows in a table)"]


def test_an_empty_file_is_empty_data_for_others_to_refuse() -> None:
    assert yaml_source.parse("# nothing\n", file="f.yaml").data is None


def test_a_mistake_stays_one_line_whatever_the_key_holds() -> None:
    located = yaml_source.parse('"a\\nb\\u2028c": 1', file="f.yaml")
    assert str(located.mistake(("a\nb\u2028c",), "is wrong")) == "f.yaml:1:1: a\\nb\\u2028c: is wrong"
