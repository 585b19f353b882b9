from __future__ import annotations

import pytest

from sdpipeline.campaigns.templates import LONGEST_RESULT, TemplateRefusedError, compile_template


def render(text: str, **variables: object) -> object:
    return compile_template(text).render(variables)


def test_text_and_variables_are_put_together() -> None:
    assert render("a {{ colour }} {{shape}}!", colour="red", shape="circle") == "a red circle!"


def test_a_lone_variable_keeps_its_type() -> None:
    assert render("{{ steps }}", steps=20) == 20
    assert render("{{ steps }} ", steps=20) == "20 "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ name|upper }}", "RED"),
        ("{{ name|replace('r', 'R')|title }}", "Red"),
        ("{% if name == 'red' %}warm{% else %}cold{% endif %}", "warm"),
        ("{{ 'warm' if name == 'red' else 'cold' }}", "warm"),
        ("{{ number|round(1) }}", "1.2"),
        ("{{ number|round|int }}", "1"),
        ("{{ -number + 1 }}", "-0.25"),
        ("{# a note #}x", "x"),
        ("{% raw %}{{ name }}{% endraw %}", "{{ name }}"),
        ("{ not a template }", "{ not a template }"),
        ("{{ name ~ '-' ~ name }}", "red-red"),
    ],
)
def test_expressions_that_prompts_need_work(text: str, expected: str) -> None:
    assert render(text, name="red", number=1.25) == expected


def test_a_value_is_data_even_if_it_looks_like_a_template() -> None:
    assert render("a {{ note }}", note="{{ 7 + 7 }}{% for %}") == "a {{ 7 + 7 }}{% for %}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{{ ''.__class__.__mro__ }}", "reaching into a value with a dot is not allowed"),
        ("{{ ''['__class__'] }}", "reaching into a value with brackets is not allowed"),
        ("{{ name() }}", "calling something is not allowed"),
        ("{{ self._TemplateReference__context }}", "reaching into a value with a dot is not allowed"),
        ("{% for x in name %}{{ x }}{% endfor %}", "a loop is not allowed"),
        ("{% set x = 1 %}", "`assign` is not allowed"),
        ("{% include '/etc/passwd' %}", "`include` is not allowed"),
        ("{% import 'os' as os %}", "`import` is not allowed"),
        ("{{ 'x' * 999999999 }}", "`mul` is not allowed"),
        ("{{ 9 ** 9 ** 9 }}", "`pow` is not allowed"),
        ("{{ name is defined }}", "a test with `is` is not allowed"),
        ("{{ name|attr('x') }}", "the filter 'attr' is not known"),
        ("{{ name|format(1) }}", "the filter 'format' is not known"),
        ("{{ 1|round(-99999999) }}", "round takes a precision from 0 to 15"),
        ("{{ 1|round(99999999, 'floor') }}", "round takes a precision from 0 to 15"),
        ("{{ 'aaaaaaaaaa'" + "|replace('a', 'aaaaaaaaaaaaaaaaaaaa')" * 9 + " }}", "becomes longer than 20,000"),
        ("{{ '\\x00' }}", "holds the character U+0000"),
        ("{{ name", "is not a template"),
        ("{{ " + "(" * 900 + "1" + ")" * 900 + " }}", "nested too deeply"),
        ("{{ " + "not " * 200 + "1 }}", "nested too deeply"),
        ("{{ " + "1 + " * 400 + "1 }}", "nested too deeply"),
        ("{{ " + "9" * 5000 + " }}", "a number too long"),
        ("{{ name }}" * 401, "more than 400 expressions"),
        ("{{ " + " ~ ".join(["name"] * 401) + " }}", "uses variables more than 400 times"),
        ("{" + "x" * 20_001, "is longer than 20,000 characters"),
        ("{{ name|int(base=99) }}", "naming an argument is not allowed"),
        ("{{ name|round }}", "cannot be filled in: could not convert string to float: 'red'"),
    ],
)
def test_what_could_reach_out_loop_or_grow_is_refused(text: str, why: str) -> None:
    with pytest.raises(TemplateRefusedError) as refused:
        render(text, name="red")
    assert why in str(refused.value)


@pytest.mark.parametrize("name", ["range", "dict", "lipsum", "cycler", "joiner", "namespace", "self", "loop", "caller"])
@pytest.mark.parametrize("text", ["{{ NAME }}", "{{ NAME }}!", "{{ NAME|string }}"])
def test_jinjas_own_names_are_no_variables(name: str, text: str) -> None:
    with pytest.raises(TemplateRefusedError):
        render(text.replace("NAME", name))


def test_an_undefined_variable_in_an_expression_is_named() -> None:
    with pytest.raises(TemplateRefusedError, match="'colour' is undefined"):
        render("{{ colour|upper }}")


def test_the_names_it_uses_are_known_without_rendering() -> None:
    assert compile_template("{% if a %}{{ b|upper }}{% else %}{{ c }}{% endif %}").names == {"a", "b", "c"}


def test_a_result_longer_than_any_prompt_is_refused() -> None:
    with pytest.raises(TemplateRefusedError, match="becomes longer"):
        render("{{ a }}{{ a }}", a="x" * LONGEST_RESULT)


def test_a_filter_does_not_work_on_joined_cells() -> None:
    with pytest.raises(TemplateRefusedError, match="filters a text longer than 100,000 characters"):
        render("{{ (a ~ a)|title|default('') }}", a="x" * 100_000)
