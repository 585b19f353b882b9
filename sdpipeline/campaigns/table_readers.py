"""Readers of csv, tsv, jsonl and parquet tables: a stream of records with every value as text."""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from subprocess import DEVNULL, PIPE, Popen
from typing import IO, Any

from sdpipeline.campaigns import parquet_process
from sdpipeline.campaigns.parquet_process import LARGEST_CELL, MAX_COLUMNS
from sdpipeline.errors import CampaignError, Mistake

LARGEST_LINE = 16 * 2**20
DELIMITERS = {".tsv": "\t", ".tab": "\t", ".csv": ","}

Record = tuple[int, list[str], str | None]
"""First line of a record (its number in a parquet table), its cells, and why it is invalid or None. The first record
holds the titles."""


class _WrongLineError(ValueError):
    """One line is not a record; the message is for the author of the table."""


def read(path: Path, name: str, wanted: Collection[str] | None = None) -> Generator[Record]:
    """Yield the records of a file, its titles first; raises CampaignError if it is not a table.

    ``wanted`` are titles: a columnar file is read for these columns only.
    """
    if path.suffix.lower() == ".parquet":
        yield from _parquet(path, name, wanted)
        return
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # A file without line ends would otherwise be read at once, however large it is.
            lines = iter(partial(file.readline, LARGEST_LINE + 1), "")
            yield from parse(lines, path.suffix, name, wanted)
    except OSError as error:
        raise CampaignError(Mistake(file=name, message=f"cannot be read: {error.strerror}")) from error
    except UnicodeDecodeError as error:
        fix = "save it as UTF-8"
        raise CampaignError(Mistake(file=name, message="is not UTF-8 text", fix=fix)) from error


def parse(lines: Iterable[str], suffix: str, name: str, wanted: Collection[str] | None = None) -> Iterator[Record]:
    """Parse the lines of a text file into records, as :func:`read` does."""
    delimiter = DELIMITERS.get(suffix.lower())
    if delimiter is not None:
        return _delimited(lines, delimiter, name)
    if suffix.lower() == ".jsonl":
        return _json_lines(lines, name, wanted)
    raise CampaignError(Mistake(file=name, message="is not a table", fix="give a .csv, .tsv, .jsonl or .parquet file"))


def of_files(paths: Sequence[str]) -> Generator[Record]:
    """Yield files as a table of their paths and their names without folder and ending."""
    yield 1, ["path", "name"], None
    for n, path in enumerate(paths, start=1):
        yield n, [path, PurePosixPath(path).stem], None


def _delimited(lines: Iterable[str], delimiter: str, name: str) -> Iterator[Record]:
    """Parse delimited text: tab-separated files have no quoting, comma-separated ones follow RFC 4180."""
    csv.field_size_limit(LARGEST_CELL)
    taken = 0

    def counted() -> Iterator[str]:
        nonlocal taken
        for text in lines:
            taken += len(text)
            if taken > LARGEST_LINE:  # line ends within quotes: a row could go on for gigabytes
                raise csv.Error(f"it is longer than {LARGEST_LINE:,} characters")
            yield text

    reader = csv.reader(
        counted(),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
        strict=True,
    )
    line, width = 1, None
    try:
        for cells in reader:
            if width is None:
                width = len(cells)
                _check_width(width, name)
            # The reader of the rows skips a line of only delimiters, whatever its width.
            ragged = len(cells) != width and any(cells)
            yield line, cells, f"has {len(cells)} cells where the first line has {width}" if ragged else None
            line, taken = reader.line_num + 1, 0
    except csv.Error as error:
        raise CampaignError(Mistake(file=name, line=line, message=f"is not a table row: {error}")) from error


def _check_width(columns: int, name: str) -> None:
    if columns > MAX_COLUMNS:
        message = f"has {columns:,} columns, at most {MAX_COLUMNS:,} are read"
        raise CampaignError(Mistake(file=name, line=1, message=message))


def _json_lines(lines: Iterable[str], name: str, wanted: Collection[str] | None) -> Iterator[Record]:
    """Parse one flat object a line; the first object's keys are the titles."""
    titles: list[str] | None = None
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            found = _object(text)
            if titles is None:
                titles = [title for title in found if wanted is None or title in wanted]
                _check_width(len(titles), name)
                yield line, titles, None
            yield line, _cells(found, titles, exact=wanted is None), None
        except _WrongLineError as wrong:
            if titles is None:
                raise CampaignError(Mistake(file=name, line=line, message=str(wrong))) from wrong
            yield line, [], str(wrong)


def _object(text: str) -> dict[str, Any]:
    """Parse a line's object; numbers keep their spelling: 1.50 stays 1.50, and 1e400 is not an infinity."""
    if len(text) > LARGEST_LINE:
        raise _WrongLineError(f"is longer than {LARGEST_LINE:,} characters")
    try:
        found = json.loads(
            text.strip(), parse_float=str, parse_int=str, parse_constant=_no_number, object_pairs_hook=_without_repeats
        )
    except json.JSONDecodeError as error:
        raise _WrongLineError(f"is not JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, MemoryError) as error:
        raise _WrongLineError("is nested too deeply") from error
    if not isinstance(found, dict):
        raise _WrongLineError("is not a JSON object; write one {...} with names and values on each line")
    return found


def _no_number(word: str) -> Any:
    raise _WrongLineError(f"holds {word}, which is not JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _WrongLineError("has a key twice")
    return found


def _cells(found: dict[str, Any], titles: list[str], *, exact: bool) -> list[str]:
    missing = [title for title in titles if title not in found]
    if missing:
        raise _WrongLineError(f"has no {missing[0]!r}, which the first line has (null is an empty value)")
    if exact and len(found) > len(titles):
        other = next(title for title in found if title not in titles)
        raise _WrongLineError(
            f"has {other!r}, which the first line lacks; add it there, or name the columns you need in columns:"
        )
    return [_text(title, found[title]) for title in titles]


def _text(title: str, value: Any) -> str:
    if isinstance(value, dict | list):
        raise _WrongLineError(
            f"{title!r} holds {'a list' if isinstance(value, list) else 'an object'}, not a single value"
        )
    if isinstance(value, bool):
        return "true" if value else "false"
    text = "" if value is None else str(value)
    if len(text) > LARGEST_CELL:
        raise _WrongLineError(f"{title!r} is longer than {LARGEST_CELL:,} characters")
    return text


def _parquet(path: Path, name: str, wanted: Collection[str] | None) -> Iterator[Record]:
    """Decode a parquet file in a process with limited memory: see ``campaigns.parquet_process``."""
    if find_spec("pyarrow") is None:
        fix = "pip install 'sdpipeline[parquet]'"
        raise CampaignError(Mistake(file=name, message="parquet tables need pyarrow", fix=fix))
    too_long, row = f"has a value of more than {LARGEST_CELL:,} characters", 0
    asked = json.dumps(None if wanted is None else list(wanted))
    command = [sys.executable, "-P", parquet_process.__file__, str(path), asked]
    with tempfile.TemporaryFile() as errors, _running(command, errors) as process:
        assert process.stdout is not None
        lines = iter(partial(process.stdout.readline, LARGEST_LINE + 1), "")
        for number, line in enumerate(lines):
            if len(line) > LARGEST_LINE:
                raise CampaignError(Mistake(file=name, message=f"has a row of more than {LARGEST_LINE:,} characters"))
            if not line.endswith("\n"):  # the process died while it wrote
                break
            if number == 0:
                yield 1, json.loads(line), None
                continue
            for cells in zip(*json.loads(line), strict=True):
                row += 1
                yield row, [cell or "" for cell in cells], too_long if None in cells else None
        if process.wait() != 0:
            raise CampaignError(Mistake(file=name, message=_failure(process.returncode, errors)))


@contextmanager
def _running(command: Sequence[str], errors: IO[bytes]) -> Iterator[Popen[str]]:
    """Run the process and kill it at the end of the block."""
    with Popen(command, stdin=DEVNULL, stdout=PIPE, stderr=errors, encoding="utf-8", errors="replace") as process:
        try:
            yield process
        finally:
            process.kill()


def _failure(exit_code: int, errors: IO[bytes]) -> str:
    errors.seek(0)
    if exit_code == parquet_process.REFUSED:
        return errors.read(2_000).decode(errors="replace")
    return f"cannot be decoded in {parquet_process.MEMORY_BYTES >> 20} MiB: its reader ended with {exit_code}"
