"""Commands that run and check an installation: worker, audit, db, doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from sdpipeline import bootstrap, checkup, stopping, upkeep
from sdpipeline.cli.output import FOUND_FAULTS, AsJson, Home, print_json, print_table, settings, stdout
from sdpipeline.db import migrate
from sdpipeline.db.connection import open_database


def add_to(app: typer.Typer) -> None:
    """Put these commands on the application."""
    app.command()(worker)
    app.command()(doctor)
    for group, commands in ((_AUDIT, (verify, seal)), (_DB, (upgrade, current))):
        for command in commands:
            group.command()(command)
    app.add_typer(_AUDIT, name="audit")
    app.add_typer(_DB, name="db")


_AUDIT = typer.Typer(help="Check database, storage and seals against each other.", no_args_is_help=True)
_DB = typer.Typer(help="Migrations, also from an installed wheel.", no_args_is_help=True)


def worker(
    *,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default the first GPU, else cpu.")] = None,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="Stop when no work is left.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Run one worker process outside a flow; SIGTERM lets it finish its batch, a second one does not."""
    s = settings(home)
    with stopping.told_by(*stopping.SIGNALS) as stop:
        done = bootstrap.run_worker(s, campaign=None, until_idle=until_idle, device=device, stop=stop)
    names = ("succeeded", "reused", "failed", "batches", "gpu_seconds", "idle")
    document = {name: getattr(done, name) for name in names}
    if as_json:
        print_json(document)
    else:
        print_table("Worker", ("what", "value"), document.items())
    if stop.is_set():
        raise typer.Exit(stop.exit_code)
    if done.failed:
        raise typer.Exit(FOUND_FAULTS)


def verify(
    *,
    sample: Annotated[int | None, typer.Option(min=0, help="Read only so many pictures, chosen at random.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Read every picture (the default).")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Check every event, seal, job row and picture; exit 3 names what is wrong."""
    found = upkeep.verify(settings(home), sample=None if full else sample)
    if as_json:
        print_json(found.document())
    else:
        if found.faults:
            print_table("Faults", ("kind", "subject", "detail"), [(f.kind, f.subject, f.detail) for f in found.faults])
        skipped = f", {found.skipped} pictures skipped" if found.skipped else ""
        verdict = f"{len(found.faults)} faults" if found.faults else "no fault"
        stdout.print(
            f"{verdict} in {found.events} events ({found.unsealed} not sealed yet), {found.seals} seals "
            f"and {found.images} pictures{skipped}"
        )
    if found.faults:
        raise typer.Exit(FOUND_FAULTS)


def seal(*, home: Home = None, as_json: AsJson = False) -> None:
    """Sign what the audit log gained since the last seal."""
    count = bootstrap.seal(settings(home))
    if as_json:
        print_json({"sealed": count})
    else:
        stdout.print(f"{count} events sealed")


def upgrade(*, home: Home = None, as_json: AsJson = False) -> None:
    """Bring the database to this release's schema."""
    database = open_database(settings(home).database)
    before, after = migrate.upgrade(database)
    if as_json:
        print_json({"before": before, "after": after})
    else:
        stdout.print(f"schema {before or 'empty'} -> {after}")


def current(*, home: Home = None, as_json: AsJson = False) -> None:
    """Show the database's schema and the one this release needs."""
    s = settings(home)
    at = migrate.current(open_database(s.database)) if bootstrap.database_exists(s) else None
    if as_json:
        print_json({"current": at, "newest": migrate.newest()})
    else:
        stdout.print(f"schema {at or 'empty'}, newest {migrate.newest()}")


def doctor(*, home: Home = None, as_json: AsJson = False) -> None:
    """Try database, storage, Prefect, devices, checkpoints and keys; say what to type where one is not ok."""
    checks = checkup.checks(settings(home))
    if as_json:
        print_json({"checks": [check.document() for check in checks]})
    else:
        rows = [("ok" if check.ok else "NOT OK", check.name, check.detail, check.fix) for check in checks]
        print_table("", ("", "what", "found", "what to do"), rows)
    if not all(check.ok for check in checks):
        raise typer.Exit(FOUND_FAULTS)
