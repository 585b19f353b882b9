"""Tables that campaigns read their values from, one row at a time."""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdpipeline.campaign import Rows, nearest
from sdpipeline.errors import CampaignError, Mistake

LARGEST_CELL = 100_000


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its key, its line in the table, and its values by variable name."""

    key: str
    line: int
    values: Mapping[str, str]


def read(spec: Rows, folder: Path) -> Iterator[Row]:
    """Stream a csv or tsv table; raises CampaignError naming the line at fault.

    Tab-separated files have no quoting (https://www.iana.org/assignments/media-types/text/tab-separated-values);
    comma-separated ones follow RFC 4180. Without ``columns`` every column is a variable, named in
    lower case with underscores. Without ``key`` a row is known by its content.
    """
    path = folder / spec.file
    shown = spec.file
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from _rows(spec, shown, _reader(file, path, shown))
    except OSError as error:
        raise CampaignError(Mistake(file=shown, message=f"cannot be read: {error.strerror}")) from error
    except UnicodeDecodeError as error:
        raise CampaignError(Mistake(file=shown, message="is not UTF-8 text")) from error


def _reader(file: Iterator[str], path: Path, shown: str) -> Iterator[tuple[int, list[str]]]:
    kinds = {".tsv": "\t", ".tab": "\t", ".csv": ","}
    delimiter = kinds.get(path.suffix.lower())
    if delimiter is None:
        raise CampaignError(Mistake(file=shown, message="is no table", fix="give a .csv or .tsv file"))
    csv.field_size_limit(LARGEST_CELL)
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise CampaignError(Mistake(file=shown, line=reader.line_num, message=str(error))) from error


def _rows(spec: Rows, shown: str, reader: Iterator[tuple[int, list[str]]]) -> Iterator[Row]:
    _, header = next(reader, (1, []))
    columns = _columns(spec, header, shown)
    key_column = _position(spec.key, header, shown) if spec.key else None
    seen: Counter[str] = Counter()
    for line, cells in reader:
        if not any(cells):
            continue
        if len(cells) != len(header):
            message = f"has {len(cells)} cells where the header has {len(header)}"
            raise CampaignError(Mistake(file=shown, line=line, message=message))
        values = {name: cells[position] for name, position in columns.items()}
        yield Row(_key(cells, key_column, seen, shown, line), line, values)


def _columns(spec: Rows, header: list[str], shown: str) -> dict[str, int]:
    if spec.columns is not None:
        return {name: _position(title, header, shown) for name, title in spec.columns.items()}
    names = [variable_name(title) for title in header]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not header:
        message = f"has two columns named {twice[0]!r}" if twice else "is empty"
        raise CampaignError(Mistake(file=shown, line=1, message=message, fix="name the columns you need in columns:"))
    return {name: n for n, name in enumerate(names)}


def variable_name(title: str) -> str:
    """A column's title as a variable: ``Unit price (EUR)`` becomes ``unit_price_eur``."""
    name = re.sub(r"\W+", "_", title.strip().lower()).strip("_")
    return name if name and not name[0].isdigit() else f"column_{name}"


def _position(title: str, header: list[str], shown: str) -> int:
    if title not in header:
        raise CampaignError(Mistake(file=shown, line=1, message=f"no column {title!r}", fix=nearest(title, header)))
    return header.index(title)


def _key(cells: list[str], key_column: int | None, seen: Counter[str], shown: str, line: int) -> str:
    if key_column is not None:
        key = cells[key_column]
        if not key or seen[key]:
            message = f"the key {key!r} is there twice" if key else "the key is empty"
            raise CampaignError(Mistake(file=shown, line=line, message=message, fix="keys must be unique"))
    else:
        content = hashlib.sha256("\x1f".join(cells).encode()).hexdigest()[:16]
        key = content if not seen[content] else f"{content}-{seen[content] + 1}"
        seen[content] += key != content
    seen[key] += 1
    return key
