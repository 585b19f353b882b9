"""Tables of a campaign's values, read one row at a time."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sdpipeline.campaigns import table_readers
from sdpipeline.campaigns.table_readers import Record
from sdpipeline.campaigns.yaml_source import control_character
from sdpipeline.errors import Mistake

OnMistake = Callable[[Mistake], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: its key, its line in the table, and its values by variable name."""

    key: str
    line: int
    values: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A csv, tsv, jsonl or parquet table, or the ``files`` of a folder as one.

    Mistakes quote ``name``; ``columns`` maps variables to titles. Tab-separated files have no quoting
    (https://www.iana.org/assignments/media-types/text/tab-separated-values); comma-separated ones follow RFC 4180.
    Values are texts in every format, so that a row keeps its identity when its table is saved in another one:
    numbers as they are written, ``true`` and ``false``, and an empty text for null. Without ``columns`` every column
    is a variable, named in lower case with underscores. Without ``key`` a row's content identifies it.
    """

    path: Path
    name: str
    key: str | None = None
    columns: Mapping[str, str] | None = None
    files: Sequence[str] | None = None

    def titles(self) -> list[str]:
        """Return the first line's cells; raises CampaignError if the file is not a table."""
        with closing(self._records(None)) as found:
            return next(found, (1, [], None))[1]

    def variables(self, titles: list[str]) -> dict[str, int]:
        """Return each variable's column number. The campaign's checks report missing titles."""
        if self.columns is not None:
            return {name: titles.index(title) for name, title in self.columns.items() if title in titles}
        return {variable_name(title): n for n, title in enumerate(titles)}

    def wanted(self) -> list[str] | None:
        """Return the titles of the columns to read; ``None`` for all."""
        if self.columns is None:
            return None
        return [*self.columns.values(), *([self.key] if self.key is not None else [])]

    def rows(self, on_mistake: OnMistake) -> Iterator[Row]:
        """Stream the rows; an invalid row goes to ``on_mistake`` instead."""
        with closing(self._records(self.wanted())) as found:
            yield from _rows(self, found, on_mistake)

    def _records(self, wanted: list[str] | None) -> Generator[Record]:
        if self.files is not None:
            return table_readers.of_files(self.files)
        return table_readers.read(self.path, self.name, wanted)


def read_rows(table: Table, lines: Iterable[str], on_mistake: OnMistake) -> Iterator[Row]:
    """Yield the rows of a table from its lines."""
    return _rows(table, table_readers.parse(lines, table.path.suffix, table.name, table.wanted()), on_mistake)


def variable_name(title: str) -> str:
    """Convert a column's title to a variable: ``Unit price (EUR)`` becomes ``unit_price_eur``."""
    name = re.sub(r"\W+", "_", title.strip().lower()).strip("_")
    return name if name and not name[0].isdigit() else f"column_{name}"


def _rows(table: Table, found: Iterator[Record], on_mistake: OnMistake) -> Iterator[Row]:
    _, titles, _ = next(found, (1, [], None))
    columns = table.variables(titles)
    key_column = titles.index(table.key) if table.key in titles else None
    # Only the wanted columns, as a columnar reader has no others: the content key is the same in every format.
    asked = [n for n, title in enumerate(titles) if (wanted := table.wanted()) is None or title in wanted]
    known = _Keys()
    for line, cells, refused in found:
        if not any(cells) and not refused:
            continue
        wrong = refused
        if not wrong and (character := control_character("".join(cells))):
            wrong = f"holds the character {character}"
        if not wrong:
            key = known.of([cells[n] for n in asked]) if key_column is None else cells[key_column]
            wrong = None if key_column is None else known.refusal(key)
        if wrong:
            on_mistake(Mistake(file=table.name, line=line, message=wrong))
            continue
        yield Row(key=key, line=line, values={name: cells[position] for name, position in columns.items()})


class _Keys:
    """Set of known row keys, as digests of at most 16 bytes, so that a million rows take little memory."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self._again: Counter[str] = Counter()

    def of(self, cells: list[str]) -> str:
        """Derive a key from the content, numbered if rows are equal."""
        digest = hashlib.sha256("\x1f".join(cells).encode()).digest()[:8]
        content = digest.hex()
        if digest not in self._seen:
            self._seen.add(digest)
            return content
        self._again[content] += 1
        return f"{content}-{self._again[content] + 1}"

    def refusal(self, key: str) -> str | None:
        """Return why this cannot be a row's key; ``None`` if it can."""
        if not key:
            return "the key is empty"
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        if digest in self._seen:
            return f"the key {key!r} is used twice; keys must be unique"
        self._seen.add(digest)
        return None
