"""Process that decodes one parquet file under a memory limit: a file of a few kB can hold gigabytes.

It runs as a script, with pyarrow as its only import from outside the standard library. It writes JSON Lines to stdout:
the titles, then the cells of some rows as text, column by column. It exits with ``REFUSED`` and one sentence on stderr
if the file is not a table.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Collection, Iterator
from typing import Any

REFUSED = 3
MEMORY_BYTES = 2**30
CPU_S = 3600
LARGEST_CELL = 100_000
LARGEST_FOOTER = 16 * 2**20
MAX_COLUMNS = 16_384
ROWS_AT_ONCE = 512
LARGEST_LINE = 2**20


class _RefusedError(Exception):
    """The file is not a table of single values."""


def main(path: str, wanted: Collection[str] | None) -> None:
    """Write the table's titles and rows."""
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # other pools reserve memory that they may never use
    _limit(resource.RLIMIT_DATA, MEMORY_BYTES)
    _limit(resource.RLIMIT_CPU, CPU_S)
    _limit(resource.RLIMIT_CORE, 0)
    import pyarrow as pa

    try:
        for line in _lines(path, wanted):
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
        sys.stdout.flush()
    except MemoryError:  # pyarrow raises it too
        _leave(f"needs more than {MEMORY_BYTES >> 20} MiB to be decoded")
    except (pa.ArrowException, OSError, UnicodeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        _leave(f"cannot be read as parquet: {first.rstrip('.')}")
    except _RefusedError as error:
        _leave(str(error))


def _limit(what: int, value: int) -> None:
    """Lower a resource limit; keep one that is lower already."""
    _, hard = resource.getrlimit(what)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def _leave(why: str) -> None:
    sys.stderr.write(why)
    sys.stderr.flush()
    os._exit(REFUSED)  # skip clean-up and buffer flushing: they may need memory that is exhausted


def _lines(path: str, wanted: Collection[str] | None) -> Iterator[list[Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    _check_footer(path)
    limits = {"thrift_string_size_limit": LARGEST_FOOTER, "thrift_container_size_limit": 1_000_000}
    with parquet.ParquetFile(path, pre_buffer=False, **limits) as file:
        columns = [column for column in file.schema_arrow if wanted is None or column.name in wanted]
        if len(columns) > MAX_COLUMNS:
            raise _RefusedError(f"has {len(columns):,} columns, at most {MAX_COLUMNS:,} are read")
        titles = [column.name for column in columns]
        yield titles
        for column in columns:
            if pa.types.is_nested(column.type):
                raise _RefusedError(f"the column {column.name!r} holds {str(column.type)[:80]}, not single values")
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=titles, use_threads=False):
            texts = [_texts(column) for column in batch.columns]
            if sum(map(len, (text or "" for column in texts for text in column))) <= LARGEST_LINE:
                yield texts
            else:
                yield from ([[cell] for cell in row] for row in zip(*texts, strict=True))


def _check_footer(path: str) -> None:
    """Limit the footer, which is parsed as a whole; its length precedes the last four bytes."""
    with open(path, "rb") as file:  # noqa: PTH123 -- the script imports as little as it can
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
    if LARGEST_FOOTER < length < size:
        raise _RefusedError(f"cannot be read as parquet: its footer has {length:,} bytes")


def _texts(column: Any) -> list[str | None]:
    """Return a column's cells as text. Null is an empty text; None marks a cell that is too long."""
    import pyarrow as pa
    from pyarrow import compute

    texts = column.cast(pa.string()).fill_null("")
    lengths = compute.binary_length(texts)
    if (compute.max(lengths).as_py() or 0) > LARGEST_CELL:
        # Lengths are in bytes, and a character has up to four.
        texts = compute.if_else(compute.less_equal(lengths, 4 * LARGEST_CELL), texts, None)
    found: list[str | None] = texts.to_pylist()
    return [None if text is None or len(text) > LARGEST_CELL else text for text in found]


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
