"""Commands that run and check an installation: worker, doctor, db."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from sdpipeline import shutdown
from sdpipeline.app import doctor as app_doctor
from sdpipeline.app.factories import check_engine
from sdpipeline.app.services import database_exists
from sdpipeline.app.workers import run_worker
from sdpipeline.cli.output import FOUND_FAULTS, AsJson, Home, load_settings, print_json, print_table, stdout
from sdpipeline.db import migrate
from sdpipeline.db.connection import open_database
from sdpipeline.errors import DatabaseUnavailableError


def add_to(app: typer.Typer) -> None:
    """Register these commands on the application."""
    app.command()(worker)
    app.command()(doctor)
    for command in (upgrade, current):
        _DB.command()(command)
    app.add_typer(_DB, name="db")


_DB = typer.Typer(help="Show and run database migrations.", no_args_is_help=True)


def worker(
    *,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: the first GPU, else cpu.")] = None,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="Stop when no work is left.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Run one worker process outside a flow; SIGTERM lets it finish its batch, a second SIGTERM does not."""
    settings = load_settings(home)
    check_engine(settings)
    with shutdown.handle_signals(*shutdown.SIGNALS) as stop:
        try:
            done = run_worker(settings, campaign=None, until_idle=until_idle, device=device, stop=stop)
        except DatabaseUnavailableError:
            if not stop.is_set():
                raise
            raise typer.Exit(stop.exit_code) from None  # it was still waiting for the database
    names = ("succeeded", "reused", "failed", "blocked", "batches", "gpu_seconds", "idle")
    document = {name: getattr(done, name) for name in names}
    if as_json:
        print_json(document)
    else:
        print_table("Worker", ("what", "value"), document.items())
    if stop.is_set():
        raise typer.Exit(stop.exit_code)
    if done.failed or done.blocked:
        raise typer.Exit(FOUND_FAULTS)


def upgrade(*, home: Home = None, as_json: AsJson = False) -> None:
    """Migrate the database to this release's schema."""
    with closing(open_database(load_settings(home).database)) as database:
        before, after = migrate.upgrade(database)
    if as_json:
        print_json({"before": before, "after": after})
    else:
        stdout.print(f"schema {before or 'empty'} -> {after}")


def current(*, home: Home = None, as_json: AsJson = False) -> None:
    """Show the database's schema and the one this release needs."""
    settings = load_settings(home)
    at = None
    if database_exists(settings):
        with closing(open_database(settings.database)) as database:
            at = migrate.current(database)
    if as_json:
        print_json({"current": at, "newest": migrate.newest()})
    else:
        stdout.print(f"schema {at or 'empty'}, newest {migrate.newest()}")


def doctor(*, home: Home = None, as_json: AsJson = False) -> None:
    """Check database, storage, Prefect, devices, checkpoints and keys; print the fix for each failed check."""
    checks = app_doctor.checks(load_settings(home))
    if as_json:
        print_json({"checks": [check.document() for check in checks]})
    else:
        rows = [("ok" if check.ok else "NOT OK", check.name, check.detail, check.fix) for check in checks]
        print_table("", ("", "check", "result", "fix"), rows)
    if not all(check.ok for check in checks):
        raise typer.Exit(FOUND_FAULTS)
