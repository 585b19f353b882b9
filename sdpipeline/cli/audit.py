"""Commands of the audit log: audit verify, seal, export, prove."""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from sdpipeline import audit, shutdown
from sdpipeline.app import maintenance, sealing
from sdpipeline.app.keys import seal_key
from sdpipeline.app.services import open_services
from sdpipeline.audit import export as audit_export
from sdpipeline.audit.findings import Verification
from sdpipeline.audit.offline import LONGEST_LINE, verify_export
from sdpipeline.audit.proof import Success, prove, success_of_job, success_of_picture, verify_proof
from sdpipeline.audit.seals import EVERY_S, MAX_EVENTS
from sdpipeline.cli.output import (
    FOUND_FAULTS,
    AsJson,
    Home,
    load_settings,
    print_json,
    print_table,
    refuse,
    refuse_place,
    stdout,
)
from sdpipeline.db import audit_queries
from sdpipeline.db.connection import Connection
from sdpipeline.domain import Json
from sdpipeline.private_files import users_umask
from sdpipeline.provenance.untrusted import UnreadableError, parse_object

_GROUP = typer.Typer(help="Seal, verify and export the audit log; prove single pictures.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Register these commands on the application."""
    commands = (("verify", verify), ("seal", seal), ("export", export), ("prove", prove_image))
    for name, command in commands:
        _GROUP.command(name)(command)
    app.add_typer(_GROUP, name="audit")


def verify(
    *,
    sample: Annotated[
        int | None, typer.Option(min=0, help="Check only this number of pictures, chosen at random.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Check all pictures and approved weights (the default).")
    ] = False,
    exported: Annotated[
        Path | None, typer.Option("--export", help="Check only this export; needs no settings and no database.")
    ] = None,
    proof: Annotated[
        Path | None, typer.Option(help="Check only this proof; needs no settings and no database.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="With --proof: check that the proof is for this picture.")] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(help="A public key to trust instead of the key in the settings; may be repeated."),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Check all teams' events, seals, jobs, campaigns and pictures, or an export or a proof; exit 3 on faults."""
    alone = [each for each in (exported, proof) if each is not None]
    if len(alone) > 1 or (alone and (sample is not None or full)):
        raise refuse("--export, --proof and --sample or --full cannot be combined", "give one of them")
    if image and proof is None:
        raise refuse("--image needs --proof")
    trusted = tuple(audit.public_key(each) for each in key or ()) or None
    if alone:
        found = _verified_alone(exported, proof, image, trusted)
    else:
        with open_services(load_settings(home), create=False) as services:
            found = maintenance.verify(services, sample=None if full else sample, trusted=trusted)
    _show(found, as_json=as_json, compare=bool(alone) and not key)
    if found.faults:
        raise typer.Exit(FOUND_FAULTS)


def _verified_alone(
    exported: Path | None, proof: Path | None, image: Path | None, trusted: tuple[str, ...] | None
) -> Verification:
    """Verify an export or a proof by the files and the trusted keys only, without reading settings."""
    if exported is not None:
        with _opened(exported) as file:
            # A file without line ends would otherwise be read at once, however large it is.
            return verify_export(iter(partial(file.readline, LONGEST_LINE + 1), b""), trusted=trusted)
    assert proof is not None
    return verify_proof(_proof(proof), trusted=trusted, picture=_read(image) if image is not None else None)


def seal(
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Keep sealing until stopped.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="With --watch: seconds between seals.")] = EVERY_S,
    events: Annotated[
        int, typer.Option(min=1, help="With --watch: seal sooner when this number of events is unsealed.")
    ] = MAX_EVENTS,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Sign the audit events since the last seal."""
    settings = load_settings(home)
    if not watch:
        with open_services(settings) as services:
            count = sealing.seal(services)
        if as_json:
            print_json({"sealed": count})
        else:
            stdout.print(f"{count} events sealed")
        return
    sealed = 0

    def print_seal(count: int) -> None:
        nonlocal sealed
        sealed += count
        if not as_json:
            stdout.print(f"{count} events sealed")

    with shutdown.handle_signals(*shutdown.SIGNALS) as stop, open_services(settings, until=stop) as services:
        sealing.keep_sealing(services, stop, every_s=every, events=events, on_seal=print_seal)
    if as_json:
        print_json({"sealed": sealed})
    raise typer.Exit(stop.exit_code)


def export(
    *,
    out: Annotated[Path | None, typer.Option(help="Output file; default: standard output.")] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Seal, then write the whole log with its seals and keys as JSON Lines, for audit verify --export."""
    settings = load_settings(home)
    if as_json and out is None:
        raise refuse("--json needs --out: the export itself goes to standard output", "--out audit.jsonl")
    refuse_place(out)
    with open_services(settings, create=False) as services:
        sealing.seal(services)
        if out is None:
            audit_export.write(services.database, seal_key(settings), sys.stdout.buffer)
            return
        # Under another name first, so that an interrupted export leaves no partial file under the final name.
        unfinished = out.with_name(f"{out.name}.part")
        with users_umask(), unfinished.open("wb") as file:
            done = audit_export.write(services.database, seal_key(settings), file)
        unfinished.replace(out)
    if as_json:
        print_json(done.document() | {"file": str(out)})
    else:
        stdout.print(f"{done.events} events and {done.seals} seals in {out}, signed by {done.public_key}")


def prove_image(
    picture: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture's file, key or address, or a job's id.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Output file of the proof; default: standard output.")] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Write the proof that the sealed log records a picture's success, for audit verify --proof."""
    settings = load_settings(home)
    refuse_place(out)
    with open_services(settings, create=False) as services:
        with services.database.read() as connection:
            success = _success(connection, picture, settings.team)
            document = prove(connection, success)
        if document is None:
            sealing.seal_or_wait(services)
            with services.database.read() as connection:
                document = prove(connection, success)
    if out is None:
        print_json(document)
        return
    with users_umask():
        out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json({"file": str(out), "subject": success.event["subject"]})
    else:
        stdout.print(f"{out} proves {success.event['subject']}, {success.event['image']['sha256']}")


def _success(connection: Connection, picture: str, team: str) -> Success:
    path = Path(picture)
    if path.is_file():
        return success_of_picture(connection, hashlib.sha256(_read(path)).hexdigest(), team=team)
    if picture.isdigit():
        return success_of_job(connection, int(picture), team=team)
    sha256 = audit_queries.digest_at(connection, picture, team=team)
    if sha256 is None:
        raise refuse(
            f"{picture} is neither a file nor a picture's key or address", "see sdpipeline jobs CAMPAIGN --json"
        )
    return success_of_picture(connection, sha256, team=team)


def _proof(path: Path) -> Json:
    try:
        with _opened(path) as file:
            document: Json = parse_object(file.read(LONGEST_LINE + 1), largest=LONGEST_LINE)
    except UnreadableError as error:
        raise refuse(f"{path} is not a proof: it {error}", "write one with sdpipeline audit prove") from error
    return document


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise refuse(f"{path} cannot be read: {error.strerror}") from error


def _read(path: Path) -> bytes:
    with _opened(path) as file:
        return file.read()


def _show(found: Verification, *, as_json: bool, compare: bool) -> None:
    if as_json:
        print_json(found.document())
        return
    if found.faults:
        print_table("Faults", ("kind", "subject", "detail"), [(f.kind, f.subject, f.detail) for f in found.faults])
    skipped = f", {found.skipped} pictures skipped" if found.skipped else ""
    count = len(found.faults) + found.more_faults
    stdout.print(
        f"{f'{count} faults' if count else 'no fault'} in {found.events} events ({found.unsealed} not sealed yet), "
        f"{found.seals} seals and {found.images} pictures{skipped}"
    )
    for public_key in found.signers if compare else ():
        stdout.print(f"signed by {public_key}: compare it with the key you were given, or pass that key with --key")
