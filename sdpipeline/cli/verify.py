"""Command that verifies pictures from files, folders and buckets: verify."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from sdpipeline import provenance
from sdpipeline.app.keys import trust_anchors
from sdpipeline.app.services import database_exists, open_services
from sdpipeline.app.stores import s3_options
from sdpipeline.campaigns.inputs import LARGEST_INPUT_BYTES
from sdpipeline.cli.output import (
    FOUND_FAULTS,
    AsJson,
    Home,
    load_settings,
    print_json,
    print_table,
    refuse,
    stderr,
    stdout,
)
from sdpipeline.errors import InputImageError, ObjectMissingError
from sdpipeline.provenance import VerifiedPicture
from sdpipeline.reporting import verify as verification
from sdpipeline.reporting.verify import Checked, Register
from sdpipeline.settings import Settings
from sdpipeline.storage import ForeignObjects, is_bucket_url, open_store

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_SHOWN = 20

_T = TypeVar("_T")
_Named = tuple[str, Callable[[], bytes]]


def add_to(app: typer.Typer) -> None:
    """Register this command on the application."""
    app.command()(verify)


def verify(
    picture: Annotated[str, typer.Argument(metavar="FILE|DIR|s3://...", help="A picture, or all of a folder.")],
    *,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Show a picture's signer, its AI mark, its source pictures and its match in the database."""
    settings = load_settings(home)
    trusted = trust_anchors(settings)
    if not picture:
        raise refuse("no picture was given", "a file, a folder or s3://bucket/key")
    named, single = _named(settings, picture)
    with _register(settings) as register:
        check = partial(_checked, trust_anchors=trusted, register=register, single=single)
        checked = [check(each) for each in _shown(named, hidden=as_json or single)]
    ok = all(each.ok for each in checked)
    asked = register is not None
    if as_json:
        documents = [each.document() | ({} if asked else {"known": None}) for each in checked]
        print_json(documents[0] if single else {"ok": ok, "images": len(checked), "pictures": documents})
    elif single:
        _print_picture(checked[0])
    else:
        _print_summary(checked)
    if not (asked or as_json):
        stdout.print(f"the database was not checked: there is none in {settings.home} (name another home with --home)")
    if not ok:
        raise typer.Exit(FOUND_FAULTS)


def _named(settings: Settings, picture: str) -> tuple[list[_Named], bool]:
    """Return the pictures with a reader for each; also return True if a single picture was named."""
    if is_bucket_url(picture):
        if not picture.endswith("/"):
            return [(picture, partial(_in_bucket, settings, picture))], True
        store = open_store(picture, s3_options(settings))
        keys = sorted(key for key in store.list() if key.lower().endswith(SUFFIXES))
        return _some([(store.url(key), partial(store.get, key)) for key in keys], picture), False
    path = Path(picture)
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES and each.is_file())
        return _some([(str(each), partial(_in_file, each)) for each in files], picture), False
    return [(picture, partial(_in_file, path))], True


def _in_file(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(LARGEST_INPUT_BYTES + 1)
    if len(data) > LARGEST_INPUT_BYTES:
        raise InputImageError(f"it is larger than {LARGEST_INPUT_BYTES >> 20} MiB")
    return data


def _some(named: list[_Named], where: str) -> list[_Named]:
    if not named:
        raise refuse(f"{where} has no pictures", f"file names must end in {', '.join(SUFFIXES)}")
    return named


def _in_bucket(settings: Settings, url: str) -> bytes:
    return ForeignObjects(s3_options(settings)).read(url, most_bytes=LARGEST_INPUT_BYTES).data


@contextmanager
def _register(settings: Settings) -> Iterator[Register | None]:
    """Open the register of recorded pictures, or yield None without a database."""
    if not database_exists(settings):
        yield None
        return
    with open_services(settings, create=False) as opened:
        yield Register(opened.database, opened.store, settings.team)


def _checked(named: _Named, *, trust_anchors: str, register: Register | None, single: bool) -> Checked:
    name, read = named
    try:
        return verification.check(name, read(), trust_anchors=trust_anchors, register=register)
    except (OSError, ObjectMissingError, InputImageError) as error:
        why = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        if single:
            raise refuse(f"{name}: {why}", "give a png, jpeg or webp picture") from error
        broken = VerifiedPicture(c2pa="invalid", digital_source_type=None, record=None, faults=(why,))
        return Checked(name=name, marks=broken, match=None, faults=broken.faults)


def _shown(items: list[_T], *, hidden: bool) -> Iterable[_T]:
    from rich.progress import track

    return track(items, description="verifying", console=stderr, disable=hidden)


def _print_picture(checked: Checked) -> None:
    marks = checked.marks
    stdout.print(f"{checked.name}: {'ok' if checked.ok else 'not ok'}")
    kinds = {provenance.GENERATED: "made by AI", provenance.COMPOSITE: "a picture from outside, changed by AI"}
    mark = kinds.get(marks.digital_source_type or "", marks.digital_source_type or "no mark as AI-made")
    rows = [("marked as", mark), ("signature", _signature(marks)), ("database", _match_text(checked))]
    rows += [("fault", fault) for fault in checked.faults]
    print_table("", ("what", "found"), rows)
    if marks.parents:
        columns = ("generation", "role", "relationship", "stage", "marked as", "faults")
        lines = [
            (
                str(each.depth),
                each.role,
                each.relationship,
                (each.record or {}).get("stage", ""),
                (each.digital_source_type or "").rpartition("/")[2],
                ", ".join(each.faults),
            )
            for each in marks.parents
        ]
        print_table("Made from", columns, lines)


def _print_summary(checked: list[Checked]) -> None:
    faulty = [each for each in checked if not each.ok]
    known = sum(each.match is not None for each in checked)
    stdout.print(f"{len(checked)} pictures, {len(checked) - len(faulty)} ok; the database knows {known}")
    for each in faulty[:MAX_SHOWN]:
        stdout.print(f"{each.name}: {', '.join(each.faults)} (database: {_match_text(each)})")
    if len(faulty) > MAX_SHOWN:
        stdout.print(f"... and {len(faulty) - MAX_SHOWN} more; --json lists all")


def _signature(marks: VerifiedPicture) -> str:
    if marks.c2pa == "missing":
        return "missing"
    worth = "a development key, which nobody trusts" if marks.development_key else marks.signer or "an unknown signer"
    when = f", {marks.signed_at}" if marks.signed_at else ""
    return f"{marks.c2pa}: by {worth}{when}"


def _match_text(checked: Checked) -> str:
    match = checked.match
    if match is None:
        return "does not know it"
    how = {
        "file": "knows this file",
        "pixels": "knows these pixels in another file",
        "perceptual_hash": f"knows a picture that differs in {match.distance} of 64 bits of the perceptual hash",
    }[match.by]
    deleted = ", deleted since" if match.picture.deleted else ""
    return f"{how}: job {match.picture.job}, stage {match.picture.stage} of {match.picture.campaign}{deleted}"
