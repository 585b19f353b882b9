from __future__ import annotations

import json
import sys
import tracemalloc
from contextlib import closing
from io import StringIO
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdpipeline.campaigns import table_readers
from sdpipeline.campaigns.tables import Row, Table, read_rows, variable_name
from sdpipeline.errors import CampaignError, Mistake


def rows(
    text: str, *, name: str = "t.csv", key: str | None = None, columns: dict[str, str] | None = None
) -> tuple[list[Row], list[str]]:
    """The valid rows of a table with that text, and the mistakes of the others."""
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
    assert wrong == ["t.csv:4: the key 'A' is used twice; keys must be unique", "t.csv:5: the key is empty"]


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
        ('a\n"x" y\n', "t.csv:2: is not a table row"),
        ('a\n"x\n', "t.csv:2: is not a table row"),
        (f"a\n{'x' * 100_001}\n", "t.csv:2: is not a table row: field larger than field limit"),
    ],
)
def test_a_file_that_stops_being_a_table_is_refused_at_that_line(text: str, expected: str) -> None:
    with pytest.raises(CampaignError) as refused:
        rows(text)
    assert str(refused.value).startswith(expected)


def test_another_kind_of_file_is_no_table() -> None:
    with pytest.raises(CampaignError, match=r"t\.xlsx: is not a table"):
        rows("a\n1\n", name="t.xlsx")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ('"red"', "red"),
        ("7", "7"),
        ("1.50", "1.50"),
        ("1e400", "1e400"),
        ("12345678901234567890", "12345678901234567890"),
        ("true", "true"),
        ("false", "false"),
        ("null", ""),
    ],
)
def test_a_json_value_is_the_text_it_is_written_as(value: str, text: str) -> None:
    assert values(f'{{"a": {value}, "b": "x"}}\n', name="t.jsonl") == [{"a": text, "b": "x"}]


def test_a_row_stays_the_same_row_when_its_table_is_saved_as_another_kind() -> None:
    from_csv, _ = rows("a,b\n1,true\n,x\n")
    from_json, _ = rows('{"a": 1, "b": true}\n{"b": "x", "a": null}\n', name="t.jsonl")
    assert [row.key for row in from_csv] == [row.key for row in from_json]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"a": [1]}', "'a' holds a list, not a single value"),
        ('{"a": {"b": 1}}', "'a' holds an object, not a single value"),
        ('{"b": 1}', "has no 'a', which the first line has (null is an empty value)"),
        (
            '{"a": 1, "b": 1}',
            "has 'b', which the first line lacks; add it there, or name the columns you need in columns:",
        ),
        ('{"a": 1, "a": 2}', "has a key twice"),
        ('{"a": NaN}', "holds NaN, which is not JSON"),
        ("[1]", "is not a JSON object; write one {...} with names and values on each line"),
        ('{"a": 1', "is not JSON: Expecting ',' delimiter at column 8"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"a": "\\u0000"}', "holds the character U+0000"),
        ('{"a": "\\ud800"}', "holds the character U+D800"),
        (f'{{"a": "{"x" * 100_001}"}}', "'a' is longer than 100,000 characters"),
    ],
)
def test_a_json_line_that_is_no_row_is_named_and_the_others_go_on(line: str, why: str) -> None:
    found, wrong = rows(f'{{"a": 1}}\n\n{line}\n{{"a": 2}}\n', name="t.jsonl")
    assert [row.values["a"] for row in found] == ["1", "2"]
    assert wrong == [f"t.jsonl:3: {why}"]


def test_a_first_json_line_that_is_none_refuses_the_table() -> None:
    with pytest.raises(CampaignError, match=r"t\.jsonl:1: is not JSON"):
        rows("a,b\n1,2\n", name="t.jsonl")


def test_columns_that_are_not_asked_for_may_hold_anything_in_json() -> None:
    text = '{"a": 1, "tags": ["x"]}\n{"a": 2}\n'
    found, wrong = rows(text, name="t.jsonl", key="a", columns={"size": "a"})
    assert ([row.values for row in found], wrong) == ([{"size": "1"}, {"size": "2"}], [])


def parquet(path: Path, **columns: Any) -> Path:
    """A table of those columns, in row groups of two."""
    arrow = pytest.importorskip("pyarrow", reason="needs sdpipeline[parquet]")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), path, row_group_size=2)
    return path


def read(table: Table) -> tuple[list[Row], list[str]]:
    wrong: list[Mistake] = []
    return list(table.rows(wrong.append)), [str(mistake) for mistake in wrong]


def test_a_parquet_table_has_the_same_rows_as_the_csv_it_came_from(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "t.parquet", sku=["A", "B", "C"], w=[1, 2, None], f=[0.1, 2.5, 1e-7], b=[True, False, None]
    )
    found, wrong = read(Table(path=path, name="t.parquet"))
    expected, _ = rows("sku,w,f,b\nA,1,0.1,true\nB,2,2.5,false\nC,,1e-7,\n")
    assert [(row.key, row.values) for row in found] == [(row.key, row.values) for row in expected]
    assert (wrong, [row.line for row in found]) == ([], [1, 2, 3])


def test_only_the_columns_asked_for_are_read_from_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", tags=[["x"]], colour=["red"])
    table = Table(path=path, name="t.parquet", columns={"tint": "colour"})
    assert table.titles() == ["tags", "colour"]
    assert [row.values for row in read(table)[0]] == [{"tint": "red"}]
    with pytest.raises(CampaignError, match=r"t\.parquet: the column 'tags' holds list<.*not single values"):
        read(Table(path=path, name="t.parquet"))


def test_keys_of_a_parquet_table_must_be_unique(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", sku=["A", "A", "B", None])
    found, wrong = read(Table(path=path, name="t.parquet", key="sku"))
    assert [row.key for row in found] == ["A", "B"]
    assert wrong == ["t.parquet:2: the key 'A' is used twice; keys must be unique"]


@pytest.mark.parametrize("data", [b"", b"sku\nA\n", b"PAR1" + bytes(40) + b"PAR1"])
def test_what_is_no_parquet_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(data)
    with pytest.raises(CampaignError, match=r"t\.parquet: cannot be read as parquet") as refused:
        Table(path=tmp_path / "t.parquet", name="t.parquet").titles()
    assert "\n" not in str(refused.value)


def test_without_pyarrow_a_parquet_table_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CampaignError, match=r"pip install 'sdpipeline\[parquet\]'"):
        Table(path=tmp_path / "t.parquet", name="t.parquet").titles()


def repeated(path: Path, cell: str, rows: int, columns: int = 30) -> Path:
    """A table that repeats one cell, which takes a few kB on disk."""
    arrow = pytest.importorskip("pyarrow", reason="needs sdpipeline[parquet]")
    again = arrow.DictionaryArray.from_arrays(arrow.array([0] * rows, arrow.int32()), arrow.array([cell]))
    table = arrow.table({f"column_{n}": again for n in range(columns)})
    pytest.importorskip("pyarrow.parquet").write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 50_000
    return path


def test_a_small_parquet_file_that_is_gigabytes_is_refused_in_one_line(tmp_path: Path) -> None:
    path = repeated(tmp_path / "t.parquet", "x" * 90_000, rows=4_096)
    with pytest.raises(CampaignError, match=r"^t\.parquet: needs more than 1024 MiB to be decoded$"):
        read(Table(path=path, name="t.parquet"))


def test_cells_of_a_parquet_table_are_bounded(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", a=["é" * 100_000, "é" * 100_001, "x" * 500_000, "y"])
    found, wrong = read(Table(path=path, name="t.parquet"))
    assert [row.values["a"][:1] for row in found] == ["é", "y"]
    assert wrong == [f"t.parquet:{row}: has a value of more than 100,000 characters" for row in (2, 3)]


def test_a_parquet_table_read_in_part_leaves_no_process(tmp_path: Path) -> None:
    path = repeated(tmp_path / "t.parquet", "x", rows=200_000, columns=3)
    before = {child.pid for child in psutil.Process().children()}
    with closing(table_readers.read(path, "t.parquet")) as found:
        next(found)
        assert {child.pid for child in psutil.Process().children()} > before
    assert {child.pid for child in psutil.Process().children()} == before


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_a_table_of_too_many_columns_is_refused(suffix: str) -> None:
    names = [f"c{n}" for n in range(20_000)]
    text = json.dumps(dict.fromkeys(names, 1)) if suffix == "jsonl" else {"csv": ",", "tsv": "\t"}[suffix].join(names)
    with pytest.raises(CampaignError, match="has 20,000 columns, at most 16,384 are read"):
        rows(text + "\n", name=f"t.{suffix}")


def test_files_are_a_table_of_their_paths_and_names() -> None:
    table = Table(path=Path(), name="*.png", key="path", files=["in/a.b.png", "in/c.png"])
    found, wrong = read(table)
    assert table.titles() == ["path", "name"]
    assert [(row.key, dict(row.values)) for row in found] == [
        ("in/a.b.png", {"path": "in/a.b.png", "name": "a.b"}),
        ("in/c.png", {"path": "in/c.png", "name": "c"}),
    ]
    assert wrong == []


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_file_without_line_ends_does_not_fill_the_memory(name: str, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(400 * 2**20)  # NULs, which take no space on disk
    tracemalloc.start()
    try:
        with pytest.raises(CampaignError, match=rf"{name}:1: "):
            Table(path=tmp_path / name, name=name).titles()
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()


def test_a_line_that_is_too_long_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"a": 1}) + "\n" + " " * 16 * 2**20 + '{"a": 2}\n')
    _, wrong = read(Table(path=tmp_path / "t.jsonl", name="t.jsonl"))
    assert wrong[0] == "t.jsonl:2: is longer than 16,777,216 characters"


def test_a_row_that_never_ends_is_refused_and_not_held_in_memory() -> None:
    table = Table(path=Path("rows.csv"), name="rows.csv")
    endless = chain(["a,b\n"], ['"x\n'], repeat('","x\n', 4_000_000))
    mistakes: list[Mistake] = []
    with pytest.raises(CampaignError, match="is not a table row: it is longer than 16,777,216 characters"):
        list(read_rows(table, endless, mistakes.append))
    assert not mistakes
