from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest

from sdpipeline.errors import CampaignError, Mistake
from sdpipeline.rows import Row, Table, read_rows, variable_name


def rows(
    text: str, *, name: str = "t.csv", key: str | None = None, columns: dict[str, str] | None = None
) -> tuple[list[Row], list[str]]:
    """The rows of a table with that text, and what is wrong with others."""
    wrong: list[Mistake] = []
    table = Table(path=Path(name), name=name, key=key, columns=columns)
    return list(read_rows(table, StringIO(text, newline=""), wrong.append)), [str(mistake) for mistake in wrong]


def values(text: str, *, name: str = "t.csv") -> list[dict[str, str]]:
    return [dict(row.values) for row in rows(text, name=name)[0]]


def test_quotes_are_data_in_a_tab_separated_table() -> None:
    assert values('note\tsize\n"red, 3" wide\t1\n"\t2\n', name="t.tsv") == [
        {"note": '"red, 3" wide', "size": "1"},
        {"note": '"', "size": "2"},
    ]


def test_quotes_enclose_a_cell_of_a_comma_separated_table() -> None:
    assert values('note,size\n"red, ""big""\nand round",1\n') == [{"note": 'red, "big"\nand round', "size": "1"}]


def test_a_row_is_known_by_the_line_it_starts_on() -> None:
    found, _ = rows('note\n"a\nb"\nc\n')
    assert [row.line for row in found] == [2, 4]


def test_windows_line_ends_are_no_part_of_a_cell() -> None:
    assert values("a\tb\r\n1\t2\r\n", name="t.tsv") == [{"a": "1", "b": "2"}]


def test_a_cell_that_looks_like_a_template_is_only_text() -> None:
    assert values("note\n{{ 7 * 7 }}\n") == [{"note": "{{ 7 * 7 }}"}]


def test_empty_lines_are_passed_over() -> None:
    assert len(values("a,b\n1,2\n\n,\n3,4\n")) == 2


def test_a_ragged_row_is_named_and_the_others_go_on() -> None:
    found, wrong = rows("a,b\n1,2\n3\n4,5,6\n7,8\n")
    assert len(found) == 2
    assert wrong == [
        "t.csv:3: has 1 cells where the first line has 2",
        "t.csv:4: has 3 cells where the first line has 2",
    ]


def test_keys_tell_rows_and_must_be_unique() -> None:
    found, wrong = rows("sku,a\nA,1\nB,1\nA,2\n,3\n", key="sku")
    assert [row.key for row in found] == ["A", "B"]
    assert wrong == ["t.csv:4: the key 'A' was there before; keys must be unique", "t.csv:5: the key is empty"]


def test_without_a_key_a_row_is_known_by_its_content_wherever_it_stands() -> None:
    before, _ = rows("a,b\n1,2\n3,4\n")
    after, _ = rows("a,b\n3,4\n0,0\n1,2\n")
    assert {row.key for row in before} < {row.key for row in after}


def test_equal_rows_without_a_key_are_numbered() -> None:
    found, wrong = rows("a\nx\nx\nx\n")
    assert not wrong
    assert len({row.key for row in found}) == 3
    assert found[2].key == found[0].key + "-3"


def test_cells_are_not_confused_across_their_borders() -> None:
    found, _ = rows("a,b\nxy,z\nx,yz\n")
    assert found[0].key != found[1].key


def test_a_control_character_in_a_cell_is_refused() -> None:
    found, wrong = rows("a\nx\x00y\nok\n")
    assert [row.values["a"] for row in found] == ["ok"]
    assert wrong == ["t.csv:2: holds the character U+0000"]


def test_chosen_columns_get_their_own_names() -> None:
    found, _ = rows("SKU,Farbe\nA,rot\n", columns={"colour": "Farbe"})
    assert found[0].values == {"colour": "rot"}


@pytest.mark.parametrize(
    ("title", "name"),
    [("Unit price (EUR)", "unit_price_eur"), ("SKU", "sku"), ("2nd", "column_2nd"), ("%", "column_"), (" a ", "a")],
)
def test_a_title_becomes_a_variable(title: str, name: str) -> None:
    assert variable_name(title) == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('a\n"x" y\n', "t.csv:2: is no table row"),
        ('a\n"x\n', "t.csv:2: is no table row"),
        (f"a\n{'x' * 100_001}\n", "t.csv:2: is no table row: field larger than field limit"),
    ],
)
def test_a_file_that_stops_being_a_table_is_refused_at_that_line(text: str, expected: str) -> None:
    with pytest.raises(CampaignError) as refused:
        rows(text)
    assert str(refused.value).startswith(expected)


def test_another_kind_of_file_is_no_table() -> None:
    with pytest.raises(CampaignError, match=r"t\.xlsx: is no table"):
        rows("a\n1\n", name="t.xlsx")
