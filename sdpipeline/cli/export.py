"""Command that exports pictures to a folder: export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from sdpipeline.app.services import open_services
from sdpipeline.cli.output import FOUND_FAULTS, AsJson, CampaignName, Home, load_settings, print_json, stderr, stdout
from sdpipeline.private_files import users_umask
from sdpipeline.reporting import export
from sdpipeline.reporting.export import Exported, OnProgress

MAX_SHOWN = 20


def add_to(app: typer.Typer) -> None:
    """Register this command on the application."""
    app.command("export")(export_pictures)


def export_pictures(
    campaign: CampaignName,
    *,
    to: Annotated[Path, typer.Option(metavar="DIR", help="Target folder; created if missing.")],
    name: Annotated[
        str | None, typer.Option(metavar="TEMPLATE", help="Template of the file names, such as '{{ sku }}-{{ seed }}'.")
    ] = None,
    stage: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Only this stage; may be repeated; default: the last stages.")
    ] = None,
    edition: Annotated[str | None, typer.Option(help="Only this edition.")] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Copy a campaign's pictures into a folder under readable names, with a manifest.csv."""
    with open_services(load_settings(home), create=False) as services:
        campaign_id = services.campaign_id(campaign)
        choice = export.choose(services.database, campaign_id, name=name, stages=stage or [], edition=edition)
        checked = export.check(services.database, choice, to)
        with users_umask(), _progress(campaign, shown=not as_json) as on_progress:
            done = export.export(services.database, services.store, checked, on_progress=on_progress)
    if as_json:
        print_json({"campaign": campaign} | done.document())
    else:
        _print(done)
    if done.faults:
        raise typer.Exit(FOUND_FAULTS)


def _print(done: Exported) -> None:
    waiting = f"; {done.without_picture} jobs have no picture" if done.without_picture else ""
    stdout.print(f"{done.copied} pictures copied to {done.directory}, {done.unchanged} existed already{waiting}")
    for fault in done.faults[:MAX_SHOWN]:
        stderr.print(f"{fault['file']}: job {fault['job']}: {fault['url']} {fault['detail']}")
    if len(done.faults) > MAX_SHOWN:
        stderr.print(f"... and {len(done.faults) - MAX_SHOWN} more; --json lists all")


@contextmanager
def _progress(campaign: str, *, shown: bool) -> Iterator[OnProgress]:
    """Show a progress bar on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, disable=not shown) as bar:
        line = bar.add_task(campaign, total=None)
        yield lambda done, total: bar.update(line, completed=done, total=total)
