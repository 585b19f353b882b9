"""Command that repairs database and storage after a crash or a restored backup: reconcile."""

from __future__ import annotations

from typing import Annotated

import typer

from sdpipeline.app import maintenance
from sdpipeline.app.services import open_services
from sdpipeline.cli.output import FOUND_FAULTS, AsJson, Home, load_settings, print_json, print_records, stdout
from sdpipeline.maintenance.reconcile import Finding, Reconciliation


def add_to(app: typer.Typer) -> None:
    """Register this command on the application."""
    app.command()(reconcile)


def reconcile(
    *,
    repair: Annotated[
        bool, typer.Option("--repair", help="Repair the findings; objects are moved, never deleted.")
    ] = False,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Register pictures that a restored database backup lacks.")
    ] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Find differences between database and storage after a crash or a restored backup; read-only by default."""
    with open_services(load_settings(home), create=False) as services:
        done = maintenance.reconcile(services, repair=repair, adopt=adopt)
    if as_json:
        print_json(done.document())
    else:
        _print(done)
    if not done.ok:
        raise typer.Exit(FOUND_FAULTS)


def _print(done: Reconciliation) -> None:
    if done.faults:
        documents = [{name: getattr(each, name) for name in Finding.__dataclass_fields__} for each in done.faults]
        title = "Repaired" if done.repair else "Found"
        print_records(title, list(Finding.__dataclass_fields__), documents)
    if done.adoption is not None:
        gap = done.adoption.gap
        if gap is not None:
            stdout.print(
                f"the audit log lacks {gap.events} events, of seals {gap.first_seal} to {gap.last_seal}; "
                "an audit event records this, and audit verify always lists it"
            )
        waiting = f", {done.adoption.waiting} wait for their campaign to be submitted" if done.adoption.waiting else ""
        stdout.print(f"{done.adoption.adopted} pictures adopted{waiting}")
    left = "" if done.ok or done.repair else "; apply the last column with --repair"
    stdout.print(f"{len(done.faults)} findings{left}" if done.faults else "database and storage agree")
