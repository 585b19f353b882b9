"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

import pytest
from rich.cells import cell_len

from sdpipeline.cli.tables import table_lines

JOBS = [(n, "base", f"caption={n}", "succeeded", f"s3://bucket/team/campaign/{n:064x}.png") for n in range(3)]
COLUMNS = ("id", "stage", "variables", "status", "picture or error")


def test_a_table_has_a_header_and_numbers_to_the_right() -> None:
    assert list(table_lines(("id", "name"), [(1, "a"), (10, None)], 80)) == ["id  name", "--  ----", " 1  a", "10"]


@pytest.mark.parametrize("width", [1, 20, 40, 80, 160])
def test_no_cell_is_lost_at_any_width(width: int) -> None:
    text = "".join(line.replace(" ", "") for line in table_lines(COLUMNS, JOBS, width))
    for row in JOBS:
        assert all(str(cell)[-8:] in text for cell in row)
    if width >= 80:
        assert all(cell_len(line) <= width for line in table_lines(COLUMNS, JOBS, width))


def test_a_narrow_table_lists_names_and_values() -> None:
    lines = list(table_lines(COLUMNS, JOBS, 20))
    assert lines[:5] == [f"{name}: {value}" for name, value in zip(COLUMNS, JOBS[0], strict=True)]
    pair = [("time-stamp authority", "x" * 30)]
    assert list(table_lines(("what", "value"), pair, 20)) == ["time-stamp authority: " + "x" * 30]


def test_a_table_is_streamed() -> None:
    def endless() -> Iterator[tuple[int, str]]:
        for n in count():
            taken.append(n)
            yield n, "x" * (n % 300)

    taken: list[int] = []
    lines = list(islice(table_lines(("id", "text"), endless(), 80), 5))
    assert len(lines) == 5
    assert len(taken) <= 101


def test_numbers_that_grow_after_the_first_rows_stay_whole() -> None:
    lines = list(table_lines(("id", "name"), ((n, "a") for n in range(20_000)), 80))
    assert lines[-1].split() == ["19999", "a"]


def test_lines_wide_characters_and_escape_codes_keep_their_column() -> None:
    rows = [("猫" * 30, "one\ntwo"), ("\x1b[31mred\x07", "\udc80")]
    lines = list(table_lines(("text", "other"), rows, 40))
    assert all(line.isprintable() and cell_len(line) <= 40 for line in lines)
    assert "\\x1b[31mred\\x07" in lines[-1]
    assert "\\udc80" in lines[-1]
    assert sum(line.count("猫") for line in lines) == 30
