"""Command that generates a picture again from its record: reproduce."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from sdpipeline import provenance
from sdpipeline.app.campaign_files import input_folder
from sdpipeline.app.factories import build_engine
from sdpipeline.app.services import existing_database, open_services
from sdpipeline.app.stores import open_storage, s3_options
from sdpipeline.archives import contents
from sdpipeline.cli.output import (
    FOUND_FAULTS,
    AsJson,
    Home,
    load_settings,
    print_json,
    print_records,
    refuse,
    refuse_place,
    stdout,
)
from sdpipeline.db import queries
from sdpipeline.domain import Json
from sdpipeline.engine import Pixels
from sdpipeline.engine.devices import devices
from sdpipeline.errors import InputImageError, ObjectMissingError
from sdpipeline.private_files import users_umask
from sdpipeline.provenance import LARGEST_PICTURE
from sdpipeline.reporting import reproduce as reproduction
from sdpipeline.reporting.reproduce import checked_record
from sdpipeline.settings import Settings
from sdpipeline.storage import ForeignObjects
from sdpipeline.storage.keys import input_key
from sdpipeline.worker.inputs import pinned


def add_to(app: typer.Typer) -> None:
    """Register these commands on the application."""
    app.command()(reproduce)


def reproduce(
    picture: Annotated[
        str, typer.Argument(metavar="JOB_OR_IMAGE", help="A job's id, or a picture made by this program.")
    ],
    *,
    out: Annotated[Path | None, typer.Option(help="Output file for the new picture.")] = None,
    inputs: Annotated[Path | None, typer.Option(help="Folder with the input files, if storage is unavailable.")] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Generate a picture again from its record, ancestors first, and compare the pixels; exit 3 if they differ."""
    settings = load_settings(home)
    refuse_place(out)
    asked = (
        _from_file(Path(picture))
        if not picture.isdigit() or Path(picture).exists()
        else _from_job(settings, int(picture))
    )
    with existing_database(settings) as database:
        engine = build_engine(settings, devices(settings)[0], database, dtype=asked.record["ran"].get("dtype"))
        done = reproduction.reproduce(
            asked.record,
            engine,
            lambda about: _input(settings, inputs, about),
            original=asked.pixels,
            pixels_sha256=asked.pixels_sha256,
        )
    if out is not None:
        with users_umask():
            out.write_bytes(done.data)
    if as_json:
        print_json(done.document())
    else:
        if done.differences:
            print_records("Differences from the original run", ("what", "then", "now"), done.differences)
        if settings_then := [each["setting"] for each in done.differences if "setting" in each]:
            stdout.print(f"made with {', '.join(settings_then)}: use the same settings to get equal pixels")
        verdict = "every pixel is equal" if done.bit_equal else f"pixels differ by up to {done.max_abs_diff} of 255"
        stdout.print(verdict)
    if not done.bit_equal:
        raise typer.Exit(FOUND_FAULTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    record: Json
    pixels: Pixels | None = None
    pixels_sha256: str | None = None


def _from_file(path: Path) -> _Asked:
    """Read the embedded record of a picture file, and its own pixels for the comparison."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise refuse(f"{path} cannot be read: {error.strerror}", "give a job's id or a picture") from error
    try:
        record = checked_record(provenance.read_record(data), str(path))
        return _Asked(record=record, pixels=provenance.decode(data, max_pixels=LARGEST_PICTURE))
    except InputImageError as error:
        raise refuse(f"{path}: {error}", "give a job's id or a picture") from error


def _from_job(settings: Settings, job_id: int) -> _Asked:
    """Read a job's record from its sidecar, and the pixels from the picture in storage if it still exists."""
    with open_services(settings, create=False) as opened:
        with opened.database.read() as connection:
            job = queries.show(connection, job_id, team=settings.team)
            job = job or contents.show(connection, opened.store, job_id, team=settings.team)
        if job is not None and job["image_deleted_at"] is not None:
            raise refuse(f"job {job_id} cannot be made again: its picture was deleted", "sdpipeline show JOB says when")
        if job is None or job["image"] is None:
            raise refuse(f"job {job_id} has no picture", "sdpipeline jobs CAMPAIGN lists those that have")
        picture = next(each for each in job["pictures"] if each["fingerprint"] == job["fingerprint"])
        sidecar = json.loads(opened.store.get(picture["sidecar_key"]))
        record = checked_record(sidecar["record"], picture["sidecar_key"])
        try:
            pixels = provenance.decode(opened.store.get(picture["key"]), max_pixels=LARGEST_PICTURE)
        except ObjectMissingError:
            pixels = None
        return _Asked(record=record, pixels=pixels, pixels_sha256=picture["pixels_sha256"])


def _input(settings: Settings, folder: Path | None, about: Json) -> bytes:
    """Read an outside input by its digest: from the given folder, else its own bucket, else storage."""
    sha256 = about["sha256"]
    for file in sorted(folder.iterdir()) if folder is not None else ():
        if file.is_file() and hashlib.sha256(data := file.read_bytes()).hexdigest() == sha256:
            return data
    if "url" in about:
        input_folder(settings, Path()).admit(about["url"])  # an untrusted record must not open other buckets
        return pinned(ForeignObjects(s3_options(settings)), about)
    try:
        return open_storage(settings).get(input_key(sha256))
    except ObjectMissingError as error:
        raise InputImageError(f"the input {sha256} is neither in storage nor in --inputs") from error
