"""How commands speak: tables for people, one JSON document for scripts, mistakes on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sdpipeline import bootstrap
from sdpipeline.errors import BadInputError, Mistake
from sdpipeline.presentation import escaping
from sdpipeline.settings import Settings
from sdpipeline.telemetry import configure_logging

FOUND_FAULTS = 3
FILE_WIDTH = 160
"""Columns of a table that goes to a file or a log, where nobody has a terminal's eighty."""

Home = Annotated[Path | None, typer.Option("--home", help="Folder of the embedded default.", show_default="./sdp-home")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
CampaignFile = Annotated[Path, typer.Argument(metavar="CAMPAIGN.yaml", help="The campaign file.")]
CampaignName = Annotated[str, typer.Argument(metavar="CAMPAIGN", help="A submitted campaign's name.")]


class _Console(Console):
    """A console on which names from tables, pictures and records are text and nothing else."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects; control characters in texts are shown as what they are."""
        super().print(
            *(escaping.terminal_lines(each) if isinstance(each, str) else each for each in objects), **options
        )


# A sentence is one line however narrow the terminal, or none: scripts look for it.
stdout = _Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
stderr = _Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
for _console in (stdout, stderr):
    if not _console.is_terminal and "COLUMNS" not in os.environ:
        _console.width = FILE_WIDTH


def settings(home: Path | None) -> Settings:
    """The command's settings, with logging set up as they ask."""
    s = bootstrap.load_settings(home)
    configure_logging(s)
    return s


def print_json(document: Any) -> None:
    """The one JSON document of a ``--json`` command."""
    text = json.dumps(document, indent=2, ensure_ascii=False, default=str)
    sys.stdout.write(escaping.json_document(text) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table; numbers to the right."""
    lines = [[_cell(value) for value in row] for row in rows]
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for n, name in enumerate(columns):
        numeric = bool(lines) and all(line[n].replace(".", "", 1).isdigit() or not line[n] for line in lines)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    stdout.print(table, soft_wrap=False)


def print_records(title: str, columns: Sequence[str], records: Iterable[Mapping[str, Any]]) -> None:
    """A table of the named fields of records."""
    print_table(title, columns, [[record[name] for name in columns] for record in records])


def print_mistakes(mistakes: Iterable[Mistake], *, as_json: bool) -> None:
    """One line per mistake on stderr, or the JSON form on stdout."""
    if as_json:
        print_json({"errors": [_mistake_document(mistake) for mistake in mistakes]})
        return
    for mistake in mistakes:
        sys.stderr.write(f"{mistake}\n".replace("\n\n", "\n"))


def refuse(message: str, fix: str | None = None) -> BadInputError:
    """An error for an option or argument that cannot be right."""
    return BadInputError(Mistake(message=message, fix=fix))


def refuse_place(out: Path | None) -> None:
    """Refuse what a file cannot be written to, before anything is done for it."""
    if out is not None and not out.parent.is_dir():
        raise refuse(f"--out {out}: no folder {out.parent}", "make it first")
    if out is not None and out.is_dir():
        raise refuse(f"--out {out} is a folder", "name a file in it")


def _mistake_document(mistake: Mistake) -> Mapping[str, Any]:
    names = ("file", "line", "column", "key", "message", "fix")
    return {name: getattr(mistake, name) for name in names}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else escaping.terminal_lines(str(value))
