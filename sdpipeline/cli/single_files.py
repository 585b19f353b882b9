"""Parts of ``checkpoints add`` for weights in single files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from sdpipeline.app import single_files
from sdpipeline.app.checkpoint_approval import approve
from sdpipeline.app.checkpoints import catalog
from sdpipeline.app.services import existing_database, open_services
from sdpipeline.cli.output import FOUND_FAULTS, print_json, print_records, refuse, stderr
from sdpipeline.db import registry
from sdpipeline.domain import Json
from sdpipeline.engine.checkpoints import CheckpointFiles
from sdpipeline.engine.single_files.given import Given
from sdpipeline.engine.single_files.schedulers import PREDICTION_TYPES
from sdpipeline.engine.single_files.templates import FAMILIES
from sdpipeline.errors import CheckpointError
from sdpipeline.suggestions import nearest

if TYPE_CHECKING:
    from sdpipeline.engine.single_files.importer import Imported, Progress
    from sdpipeline.settings import Settings


def add_single_file(
    settings: Settings,
    alias: str,
    path: Path,
    *,
    named: Mapping[str, str | None],
    approval: registry.Approval,
    defaults: Sequence[str],
) -> Json:
    """Convert or copy one file and approve it; ``named`` are the values of the options for single files."""
    path = path.expanduser().absolute()  # a link keeps its name: a hub's cache links to files named by their hashes
    try:
        given = _given(settings, named)
        with _progress(shown=stderr.is_terminal) as progress:
            imported = single_files.add_file(settings, alias, path, given, progress)
    except CheckpointError as error:
        raise refuse(str(error)) from error
    with open_services(settings) as services:
        document = approve(services, imported.files, _of_file(approval, imported, path), defaults)
    return document | {"origin_sha256": imported.sha256, "notes": [*imported.notes, *document["notes"]]}


def _given(settings: Settings, named: Mapping[str, str | None]) -> Given:
    for option, allowed in (("--family", FAMILIES), ("--prediction-type", PREDICTION_TYPES)):
        value = named[option]
        if value is not None and value not in allowed:
            raise refuse(f"{option} {value} is not one of {', '.join(allowed)}", nearest(value, allowed))
    folders = {option: named[option] for option in ("--tokenizer", "--parts")}
    known: Mapping[str, CheckpointFiles] = {}
    if any(folders.values()):
        with existing_database(settings) as database:
            known = catalog(settings, database)
    tokenizer, parts = (single_files.folder_given(name, option, known) for option, name in folders.items())
    return Given(tokenizer=tokenizer, parts=parts, family=named["--family"], prediction_type=named["--prediction-type"])


def add_folder(
    settings: Settings, folder: Path, approval: registry.Approval, defaults: Sequence[str], *, as_json: bool
) -> None:
    """Approve every adapter below a folder on the same terms; exit 3 if some were refused."""
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise refuse(f"--all {folder} is not a folder", "name one, or register a file with checkpoints add ALIAS FILE")
    with open_services(settings) as services:
        known = catalog(settings, services.database)

        def register(imported: Imported, path: Path) -> Json:
            # Embeddings and IP-Adapters of the folder take no parameters.
            own = defaults if imported.files.kind == "lora" else ()
            return approve(services, imported.files, _of_file(approval, imported, path), own)

        try:
            with _progress(shown=stderr.is_terminal) as progress:
                rows = list(single_files.add_all(settings, folder, known, progress, register))
        except CheckpointError as error:
            raise refuse(str(error)) from error
    if not rows:
        raise refuse(f"{folder} holds no weights", "name a folder with .safetensors files")
    ok = all(row["ok"] for row in rows)
    if as_json:
        print_json({"ok": ok, "checkpoints": rows})
    else:
        shown = [{**row, "file": str(Path(str(row["file"])).relative_to(folder))} for row in rows]
        print_records("", ("alias", "kind", "family", "ok", "file"), shown)
        for row in rows:
            if not row["ok"]:
                stderr.print(f"refused: {row['detail']}")
    if not ok:
        raise typer.Exit(FOUND_FAULTS)


def _of_file(approval: registry.Approval, imported: Imported, path: Path) -> registry.Approval:
    """Return the approval with the file as its source, and the record of its conversion for the audit log."""
    approval = replace(approval, licence=approval.licence or imported.licence)
    if not imported.record:
        return replace(approval, source=str(path))
    converter = f"diffusers {imported.record['converter']['diffusers']}"
    source = f"{path} (SHA-256 {imported.sha256}, converted with {converter})"
    return replace(approval, source=source, conversion=imported.record)


@contextmanager
def _progress(*, shown: bool) -> Iterator[Progress]:
    """Show a progress bar on stderr, with the bytes of a step if their number is known."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, disable=not shown, transient=True) as bar:
        line = bar.add_task("", total=None)
        yield lambda step, done, total: bar.update(line, description=step, completed=done, total=total or None)
