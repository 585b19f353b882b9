"""Streamed plain-text tables: only the first rows are buffered, and they set the column widths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, zip_longest
from typing import Any

from rich.cells import cell_len, chop_cells, set_cell_size

from sdpipeline.cli.streams import encodable
from sdpipeline.escaping import terminal, terminal_lines

SAMPLE = 100
"""Number of rows that set the column widths."""

NARROWEST = 10
"""Minimum width of a text column: below it, each row is printed as a list of names and values."""

LONG_NUMBER = 7
_GAP = "  "
Row = Sequence[str]


def table_lines(columns: Sequence[str], rows: Iterable[Sequence[Any]], width: int) -> Iterator[str]:
    """Yield the lines of a table that is ``width`` cells wide; the last line is never empty."""
    texts = ([_cell(value) for value in row] for row in rows)
    sample = list(islice(texts, SAMPLE))
    numeric = [bool(sample) and all(_is_number(row[n]) for row in sample) for n in range(len(columns))]
    widths = _widths(columns, sample, numeric, width)
    everything = chain(sample, texts)
    if widths is None:
        yield from _listed(columns, everything)
        return
    yield from _line(columns, widths, numeric)
    yield _GAP.join("-" * each for each in widths)
    for row in everything:
        yield from _line(row, widths, numeric)


def _widths(columns: Row, sample: Sequence[Row], numeric: Sequence[bool], width: int) -> list[int] | None:
    """Return the column widths; None if they would be too narrow to read."""
    parts = [[columns[n], *(row[n] for row in sample)] for n in range(len(columns))]
    widths = [max(1, *(cell_len(line) for text in texts for line in text.split("\n"))) for texts in parts]
    if len(sample) == SAMPLE:  # numbers grow in the rows that follow
        widths = [max(own, LONG_NUMBER) if number else own for own, number in zip(widths, numeric, strict=True)]
    least = [own if number else min(own, NARROWEST) for own, number in zip(widths, numeric, strict=True)]
    room = width - len(_GAP) * (len(columns) - 1)
    if sum(least) > room:
        return None
    widths = [min(own, max(room, low)) for own, low in zip(widths, least, strict=True)]
    while sum(widths) > room:
        widest = max((n for n in range(len(widths)) if widths[n] > least[n]), key=lambda n: widths[n])
        widths[widest] -= 1
    return widths


def _line(row: Row, widths: Sequence[int], numeric: Sequence[bool]) -> Iterator[str]:
    """Yield a row's lines: a text wider than its column continues on the next line."""
    folded = [
        [piece for line in text.split("\n") for piece in chop_cells(line, width) or [""]]
        for text, width in zip(row, widths, strict=True)
    ]
    for pieces in zip_longest(*folded, fillvalue=""):
        cells = [
            piece.rjust(width) if number else set_cell_size(piece, width)
            for piece, width, number in zip(pieces, widths, numeric, strict=True)
        ]
        yield _GAP.join(cells).rstrip()


def _listed(columns: Row, rows: Iterable[Row]) -> Iterator[str]:
    """Yield each row as names and values, which a terminal may wrap; a row of two is already a name and a value."""
    if len(columns) == 2:
        yield from (f"{terminal(name)}: {terminal(value)}" for name, value in rows)
        return
    for number, row in enumerate(rows):
        if number:
            yield ""
        for name, value in zip(columns, row, strict=True):
            if value:
                text = terminal(value)
                yield f"{name}: {text}" if name else text


def _is_number(text: str) -> bool:
    return not text or text.replace(".", "", 1).isdigit()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.2f}" if isinstance(value, float) else terminal_lines(str(value))
    return text if text.isascii() else encodable(text)
