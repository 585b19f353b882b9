"""Tables that campaigns read their values from, one row at a time."""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sdpipeline.errors import CampaignError, Mistake
from sdpipeline.yamlfile import control_character

LARGEST_CELL = 100_000
DELIMITERS = {".tsv": "\t", ".tab": "\t", ".csv": ","}

OnMistake = Callable[[Mistake], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: its key, its line in the table, and its values by variable name."""

    key: str
    line: int
    values: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A csv or tsv table. ``name`` is what mistakes call it, ``columns`` maps variables to titles.

    Tab-separated files have no quoting (https://www.iana.org/assignments/media-types/text/tab-separated-values);
    comma-separated ones follow RFC 4180. Without ``columns`` every column is a variable, named in
    lower case with underscores. Without ``key`` a row is known by its content.
    """

    path: Path
    name: str
    key: str | None = None
    columns: Mapping[str, str] | None = None

    def titles(self) -> list[str]:
        """The first line's cells; raises CampaignError for what is no table."""
        with self._open() as lines:
            return next(_cells(lines, self.path, self.name), (1, []))[1]

    def variables(self, titles: list[str]) -> dict[str, int]:
        """Each variable's column. Titles that are not there are left to whoever checks the campaign."""
        if self.columns is not None:
            return {name: titles.index(title) for name, title in self.columns.items() if title in titles}
        return {variable_name(title): n for n, title in enumerate(titles)}

    def rows(self, on_mistake: OnMistake) -> Iterator[Row]:
        """Stream the rows; a row that is wrong goes to ``on_mistake`` instead."""
        with self._open() as lines:
            yield from read_rows(self, lines, on_mistake)

    @contextmanager
    def _open(self) -> Iterator[Iterable[str]]:
        try:
            with self.path.open(newline="", encoding="utf-8-sig") as file:
                yield file
        except OSError as error:
            raise CampaignError(Mistake(file=self.name, message=f"cannot be read: {error.strerror}")) from error
        except UnicodeDecodeError as error:
            fix = "save it as UTF-8"
            raise CampaignError(Mistake(file=self.name, message="is not UTF-8 text", fix=fix)) from error


def read_rows(table: Table, lines: Iterable[str], on_mistake: OnMistake) -> Iterator[Row]:
    """The rows of a table whose lines are at hand."""
    cells_of_lines = _cells(lines, table.path, table.name)
    _, titles = next(cells_of_lines, (1, []))
    columns = table.variables(titles)
    key_column = titles.index(table.key) if table.key in titles else None
    known = _Keys()
    for line, cells in cells_of_lines:
        if not any(cells):
            continue
        key = known.of(cells) if key_column is None else cells[key_column] if key_column < len(cells) else ""
        wrong = _wrong(cells, titles) or (key_column is not None and known.refusal(key))
        if wrong:
            on_mistake(Mistake(file=table.name, line=line, message=wrong))
            continue
        yield Row(key=key, line=line, values={name: cells[position] for name, position in columns.items()})


def variable_name(title: str) -> str:
    """A column's title as a variable: ``Unit price (EUR)`` becomes ``unit_price_eur``."""
    name = re.sub(r"\W+", "_", title.strip().lower()).strip("_")
    return name if name and not name[0].isdigit() else f"column_{name}"


def _cells(lines: Iterable[str], path: Path, name: str) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line it starts on."""
    delimiter = DELIMITERS.get(path.suffix.lower())
    if delimiter is None:
        raise CampaignError(Mistake(file=name, message="is no table", fix="give a .csv or .tsv file"))
    csv.field_size_limit(LARGEST_CELL)
    reader = csv.reader(
        lines,
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
        strict=True,
    )
    line = 1
    try:
        for cells in reader:
            yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise CampaignError(Mistake(file=name, line=line, message=f"is no table row: {error}")) from error


def _wrong(cells: list[str], titles: list[str]) -> str | None:
    if len(cells) != len(titles):
        return f"has {len(cells)} cells where the first line has {len(titles)}"
    if character := control_character("".join(cells)):
        return f"holds the character {character}"
    return None


class _Keys:
    """Which keys came before, 16 bytes each, so that a million rows take little memory."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self._again: Counter[str] = Counter()

    def of(self, cells: list[str]) -> str:
        """A key from the content, numbered where rows are equal."""
        digest = hashlib.sha256("\x1f".join(cells).encode()).digest()[:8]
        content = digest.hex()
        if digest not in self._seen:
            self._seen.add(digest)
            return content
        self._again[content] += 1
        return f"{content}-{self._again[content] + 1}"

    def refusal(self, key: str) -> str | None:
        """Why this cannot be a row's key; ``None`` if it can."""
        if not key:
            return "the key is empty"
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        if digest in self._seen:
            return f"the key {key!r} was there before; keys must be unique"
        self._seen.add(digest)
        return None
