"""Command output: tables for people, one JSON document for scripts, mistakes on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sdpipeline import escaping
from sdpipeline.cli.streams import encodable, is_utf8, written
from sdpipeline.cli.tables import SAMPLE, table_lines
from sdpipeline.errors import BadInputError, Mistake

if TYPE_CHECKING:
    from sdpipeline.settings import Settings

FOUND_FAULTS = 3
FILE_WIDTH = 160
"""Width of a table written to a file or a log, which has no terminal width."""

FLUSH_LINES = 500
"""Lines of a table between two flushes, so that a pipe shows rows while others are still being read."""

Home = Annotated[
    Path | None,
    typer.Option(
        "--home", help="Folder of the embedded database and storage, keys and logs.", show_default="./sdp-home"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
CampaignFile = Annotated[Path, typer.Argument(metavar="CAMPAIGN.yaml", help="The campaign file.")]
CampaignName = Annotated[str, typer.Argument(metavar="CAMPAIGN", help="A submitted campaign's name.")]


class _Escaping(Console):
    """Console that escapes names from tables, pictures and records, so that they are only text."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects; control characters in texts are escaped."""
        texts = (escaping.terminal_lines(each) if isinstance(each, str) else each for each in objects)
        super().print(*texts, **options)


class _Quiet(_Escaping):
    """Console for progress and hints: the command continues if the reader closes the pipe."""

    def on_broken_pipe(self) -> None:
        """Print nothing more."""
        self.quiet = True


class _Results(_Escaping):
    """Console for results: the command ends if the reader closes the pipe."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects; raises SdpError if stdout cannot be written."""
        with written():
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that is being handled."""
        raise  # noqa: PLE0704


# A sentence stays on one line at any terminal width: scripts search for it.
stdout = _Results(highlight=False, markup=False, emoji=False, soft_wrap=True)
stderr = _Quiet(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
for _console in (stdout, stderr):
    if not _console.is_terminal and "COLUMNS" not in os.environ:
        _console.width = FILE_WIDTH


def load_settings(home: Path | None) -> Settings:
    """Load the command's settings and configure logging by them."""
    from sdpipeline import settings as settings_module
    from sdpipeline.logs import configure_logging

    settings = settings_module.load(home=home)
    configure_logging(settings)
    return settings


def print_json(document: Any) -> None:
    """Print the JSON document of a ``--json`` command."""
    text = json.dumps(document, indent=2, ensure_ascii=not is_utf8(), default=str)
    print_text(escaping.json_document(text) + "\n")


def print_json_line(document: Any) -> None:
    """Print one line of ``--jsonl``."""
    print_text(escaping.json_document(json.dumps(document, ensure_ascii=not is_utf8())) + "\n")


def print_text(text: str) -> None:
    """Print text unchanged, for results that are not tables; a lone surrogate is escaped as in JSON."""
    with written():
        sys.stdout.write(text if text.isascii() else encodable(text))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table row by row as rows arrive, with numbers right-aligned."""
    if title:
        stdout.print(title)
    for number, line in enumerate(table_lines(columns, rows, stdout.width)):
        print_text(line + "\n")
        if number % FLUSH_LINES == SAMPLE:
            with written():
                sys.stdout.flush()


def print_records(title: str, columns: Sequence[str], records: Iterable[Mapping[str, Any]]) -> None:
    """Print a table of the named fields of records."""
    print_table(title, columns, ([record[name] for name in columns] for record in records))


def print_mistakes(mistakes: Iterable[Mistake], *, as_json: bool) -> None:
    """Print one line per mistake on stderr, or the JSON form on stdout."""
    if as_json:
        print_json({"errors": [mistake.document() for mistake in mistakes]})
        return
    _print_lines(str(mistake) for mistake in mistakes)


def print_warnings(warnings: Iterable[Mistake]) -> None:
    """Print one line per warning on stderr."""
    _print_lines(f"warning: {warning}" for warning in warnings)


def _print_lines(lines: Iterable[str]) -> None:
    with suppress(OSError):  # stderr may be closed
        for line in lines:
            sys.stderr.write(f"{line}\n".replace("\n\n", "\n"))


def refuse(message: str, fix: str | None = None) -> BadInputError:
    """Return the error for an invalid option or argument."""
    return BadInputError(Mistake(message=message, fix=fix))


def refuse_place(out: Path | None) -> None:
    """Refuse an output path that cannot be written, before any work is done."""
    if out is not None and not out.parent.is_dir():
        raise refuse(f"--out {out}: no folder {out.parent}", "make it first")
    if out is not None and out.is_dir():
        raise refuse(f"--out {out} is a folder", "name a file in it")
