"""Commands that delete data: retention and erase."""

from __future__ import annotations

from typing import Annotated

import typer

from sdpipeline.app import maintenance
from sdpipeline.app.services import open_services
from sdpipeline.cli.output import AsJson, Home, load_settings, print_json, print_table, refuse, stdout
from sdpipeline.settings import RetentionSettings

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only count; change nothing.")]


def add_to(app: typer.Typer) -> None:
    """Register these commands on the application."""
    app.command()(retention)
    app.command()(erase)


def retention(*, dry_run: DryRun = False, home: Home = None, as_json: AsJson = False) -> None:
    """Apply the retention settings: delete old pictures and prompts, archive closed editions."""
    settings = load_settings(home)
    with open_services(settings, create=False) as services:
        done = maintenance.apply_retention(services, dry_run=dry_run)
    document = {"dry_run": dry_run} | done.document()
    if as_json:
        print_json(document)
    elif settings.retention == RetentionSettings():
        stdout.print("no retention period is set: see SDP_RETENTION__… in the documentation")
    else:
        print_table("Due" if dry_run else "Done", ("what", "count"), done.document().items())


def erase(
    *,
    subject: Annotated[str, typer.Option(help="Data subject to erase, as written by the campaign's `subject`.")],
    dry_run: DryRun = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Erase one subject's data from jobs, and record a proof of the erasure that does not reveal what was erased."""
    settings, name = load_settings(home), subject.strip()
    if not name:
        raise refuse("--subject is empty", "give a value of the campaign's `subject`")
    with open_services(settings, create=False) as services:
        done = maintenance.erase(services, name, dry_run=dry_run)
    document = done.document()
    if as_json:
        print_json({"dry_run": dry_run} | document)
        return
    receipt = document.pop("receipt")
    print_table("Would erase at least" if dry_run else "Erased", ("what", "count"), document.items())
    if done.jobs and not dry_run:
        stdout.print(
            f"receipt: the audit log's commitment to this subject is {receipt['subject_commitment']}, with the salt"
        )
        stdout.print(
            f"{receipt['salt']}; the salt is not stored: give it to the person who must be able to prove the erasure"
        )
