"""Export of pictures from storage to a folder, under readable names and with a CSV manifest."""

from __future__ import annotations

import csv
import hashlib
import secrets
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from sdpipeline.campaigns import filenames, yaml_source
from sdpipeline.campaigns.filenames import EXTENSIONS, MANIFEST, Naming, Subject, WrongNameError
from sdpipeline.campaigns.tables import variable_name
from sdpipeline.db import exports
from sdpipeline.db.connection import Database
from sdpipeline.domain import Json
from sdpipeline.errors import BadInputError, Mistake, ObjectMissingError
from sdpipeline.escaping import spreadsheet
from sdpipeline.storage import ObjectStore
from sdpipeline.suggestions import nearest

COPIES_AT_ONCE = 8
COLUMNS = (
    *("job", "stage", "row", "seed", "edition", "file", "sha256", "size_bytes", "width", "height"),
    *("url", "checkpoint", "prompt"),
)

OnProgress = Callable[[int, int], None]
"""Called with the number of jobs done and the total."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Jobs of a campaign to export, and the naming of their pictures."""

    campaign_id: int
    stages: tuple[str, ...]
    edition: str | None
    naming: Naming
    templated: bool
    row_names: tuple[str, ...] = ()
    """Variables that are synonyms of the row's key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Export whose names are all valid. ``alike`` holds the digests of default names that several jobs share."""

    choice: Choice
    directory: Path
    alike: frozenset[bytes]
    jobs: int


@dataclass(slots=True, kw_only=True)
class Exported:
    """Result of an export; ``faults`` lists pictures that are missing in storage or differ from their record."""

    directory: Path
    copied: int = 0
    unchanged: int = 0
    size_bytes: int = 0
    without_picture: int = 0
    faults: list[Json] = field(default_factory=list)

    def document(self) -> Json:
        """Return the document that ``export --json`` prints."""
        counts = {name: getattr(self, name) for name in ("copied", "unchanged", "size_bytes", "without_picture")}
        manifest = str(self.directory / MANIFEST)
        return {"directory": str(self.directory), "manifest": manifest} | counts | {"faults": self.faults}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """Job with the database row of its picture; ``picture.key`` is None if the picture does not exist yet."""

    subject: Subject
    picture: Any


def choose(
    database: Database, campaign_id: int, *, name: str | None, stages: Sequence[str], edition: str | None
) -> Choice:
    """Choose the stages to export: those given, else the last of each chain.

    Raises BadInputError for an unknown stage or edition and for a wrong name template.
    """
    with database.read() as connection:
        known = exports.stages(connection, campaign_id)
        last = exports.last_stages(connection, campaign_id) if not stages else []
        editions = exports.editions(connection, campaign_id)
        source = exports.source(connection, campaign_id)
    mistakes = [
        Mistake(key="--stage", message=f"no stage {each!r}", fix=nearest(each, known))
        for each in stages
        if each not in known
    ]
    if edition is not None and edition not in editions:
        fix = nearest(edition, filter(None, editions))
        mistakes.append(Mistake(key="--edition", message=f"no edition {edition!r}", fix=fix))
    if mistakes:
        raise BadInputError(*mistakes)
    chosen = tuple(dict.fromkeys(stages or last))
    keyed, row_names = _row_names(source)
    try:
        names = (
            filenames.by_template(name) if name else filenames.by_default(keyed=keyed, stage_folders=len(chosen) > 1)
        )
    except WrongNameError as error:
        raise BadInputError(Mistake(key="--name", message=str(error), fix=error.fix)) from error
    return Choice(
        campaign_id=campaign_id,
        stages=chosen,
        edition=edition,
        naming=names,
        templated=bool(name),
        row_names=row_names,
    )


def check(database: Database, choice: Choice, directory: Path) -> Checked:
    """Name every job without writing anything; raises BadInputError for a duplicate or invalid name.

    Jobs without a picture count too: the name of a picture does not depend on the time of the export.
    """
    directory = directory.absolute()
    _check_directory(directory)
    inside, seen, alike, jobs = _Inside(directory), set[bytes](), set[bytes](), 0
    for page in _pages(database, choice):
        jobs += len(page)
        for entry in page:
            name = _name(entry.subject, choice, frozenset())
            digest = _digest(name)
            if digest in seen and choice.templated:
                raise _two_of_one_name(database, choice, entry.subject, name)
            (alike if digest in seen else seen).add(digest)
            inside.check(name)
    return Checked(choice=choice, directory=directory, alike=frozenset(alike), jobs=jobs)


def export(database: Database, store: ObjectStore, checked: Checked, *, on_progress: OnProgress) -> Exported:
    """Copy pictures that are missing or different in the folder; report faults of storage; delete nothing.

    A picture is copied only if storage still holds it as recorded.
    Raises BadInputError if the folder cannot be written.
    """
    directory = checked.directory
    done = Exported(directory=directory)
    with _translated(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with _manifest(directory) as file, ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
            manifest = csv.writer(file)
            manifest.writerow(COLUMNS)
            finished = 0
            for page in _pages(database, checked.choice):
                made = [(e, _name(e.subject, checked.choice, checked.alike)) for e in page if e.picture.key]
                done.without_picture += len(page) - len(made)
                outcomes = pool.map(lambda each: _copy(store, each[0].picture, directory / each[1]), made)
                for (entry, name), outcome in zip(made, outcomes, strict=True):
                    _account(done, entry, name, outcome)
                    if outcome in (COPIED, UNCHANGED):
                        manifest.writerow(map(spreadsheet, _manifest_row(entry, name)))
                finished += len(page)
                on_progress(finished, checked.jobs)
    return done


COPIED, UNCHANGED = "copied", "unchanged"


def _account(done: Exported, entry: _Entry, name: str, outcome: str) -> None:
    if outcome == UNCHANGED:
        done.unchanged += 1
    elif outcome == COPIED:
        done.copied += 1
        done.size_bytes += entry.picture.size_bytes
    else:
        done.faults.append({"job": entry.subject.id, "file": name, "url": entry.picture.url, "detail": outcome})


def _copy(store: ObjectStore, picture: Any, path: Path) -> str:
    """Return COPIED or UNCHANGED, else a description of what is wrong with the object."""
    if _holds(path, picture):
        return UNCHANGED
    try:
        data = store.get(picture.key)
    except ObjectMissingError:
        return "is missing in storage"
    if (sha256 := hashlib.sha256(data).hexdigest()) != picture.sha256:
        return f"was altered in storage: its sha256 is {sha256}, recorded was {picture.sha256}"
    path.parent.mkdir(parents=True, exist_ok=True)
    incoming = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        incoming.write_bytes(data)
        incoming.replace(path)
    finally:
        incoming.unlink(missing_ok=True)
    return COPIED


def _holds(path: Path, picture: Any) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != picture.size_bytes:
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == str(picture.sha256)


def _manifest_row(entry: _Entry, name: str) -> list[Any]:
    subject, picture, request = entry.subject, entry.picture, entry.picture.request
    about = [subject.id, subject.stage, subject.row, subject.seed, subject.edition, name]
    about += [picture.sha256, picture.size_bytes, picture.width, picture.height, picture.url]
    return [*about, request["checkpoint"]["alias"], request["prompt"]]


def _pages(database: Database, choice: Choice) -> Iterator[list[_Entry]]:
    with database.read() as connection:
        first, last = exports.bounds(connection, choice.campaign_id)
    after = first - 1
    while True:
        with database.read() as connection:
            rows = exports.page(
                connection,
                choice.campaign_id,
                stages=choice.stages,
                edition=choice.edition,
                after=after,
                last=last,
            )
            above = exports.inherited(connection, [row.id for row in rows])
        if not rows:
            return
        yield [_Entry(subject=_subject(row, above[row.id], choice), picture=row) for row in rows]
        after = rows[-1].id


def _subject(row: Any, above: Json, choice: Choice) -> Subject:
    return Subject(
        id=row.id,
        stage=row.stage,
        row=row.row_key,
        seed=row.seed,
        edition=row.edition,
        axes=row.axes,
        variables=dict.fromkeys(choice.row_names, row.row_key) | above | row.variables,
        extension=EXTENSIONS[row.request.get("output", {}).get("format", "png")],
    )


def _row_names(source: str) -> tuple[bool, tuple[str, ...]]:
    """Return True if rows have keys of their own, and the variables that are synonyms of such a key."""
    data = yaml_source.parse(source, file="the campaign").data
    variables = data.get("variables") if isinstance(data, dict) else None
    rows = (variables or {}).get("rows") or {}
    key = rows.get("key")
    if key is None:
        return "files" in rows, ()
    titled = [name for name, title in (rows.get("columns") or {}).items() if title == key]
    return True, tuple(dict.fromkeys([variable_name(key), *titled]))


def _name(subject: Subject, choice: Choice, alike: frozenset[bytes]) -> str:
    try:
        name = choice.naming(subject)
    except WrongNameError as error:
        raise BadInputError(Mistake(key="--name", message=str(error), fix=error.fix)) from error
    return filenames.numbered(name, subject.id) if _digest(name) in alike else name


def _digest(name: str) -> bytes:
    """Hash a name so that names which some file systems treat as equal (case, Unicode form) collide."""
    plain = unicodedata.normalize("NFC", name).casefold()
    return hashlib.blake2b(plain.encode(), digest_size=16).digest()


def _two_of_one_name(database: Database, choice: Choice, second: Subject, name: str) -> BadInputError:
    digest = _digest(name)
    subjects = (entry.subject for page in _pages(database, choice) for entry in page)
    first = next(subject for subject in subjects if _digest(_name(subject, choice, frozenset())) == digest)
    words = filenames.different(first, second)
    fix = f"add {' or '.join(f'{{{{ {word} }}}}' for word in words[:2])}"
    message = f"jobs {first.id} and {second.id} would both be {name!r}"
    return BadInputError(Mistake(key="--name", message=message, fix=fix))


class _Inside:
    """Check that refuses folders which a symbolic link leads out of the directory."""

    def __init__(self, directory: Path) -> None:
        self._root = directory.resolve()
        self._directory = directory
        self._last = ""

    def check(self, name: str) -> None:
        folder = name.rpartition("/")[0]
        if folder != self._last:
            path = self._directory / folder
            if not path.resolve().is_relative_to(self._root):
                raise BadInputError(Mistake(key="--to", message=f"{path} is a link that leads out of the folder"))
            self._last = folder


def _check_directory(directory: Path) -> None:
    """Refuse a path that is not a folder, and a folder in which our manifest would replace someone else's file.

    The folder may be new, and it may hold other files.
    """
    manifest = directory / MANIFEST
    with _translated(directory):
        if directory.exists() and not directory.is_dir():
            raise BadInputError(Mistake(key="--to", message=f"{directory} is not a folder", fix="name another"))
        if manifest.exists():
            with manifest.open(encoding="utf-8", errors="replace") as file:
                if file.readline().strip() != ",".join(COLUMNS):
                    message = f"{manifest} is not from an export and would be lost"
                    raise BadInputError(Mistake(key="--to", message=message, fix="name another folder"))


@contextmanager
def _manifest(directory: Path) -> Iterator[TextIO]:
    """Open the CSV manifest; it appears under its name only when it is complete."""
    incoming = directory / f".{secrets.token_hex(8)}.part"
    try:
        with incoming.open("w", encoding="utf-8", newline="") as file:
            yield file
        incoming.replace(directory / MANIFEST)
    finally:
        incoming.unlink(missing_ok=True)


@contextmanager
def _translated(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"{error.filename or directory} cannot be written: {error.strerror or error}"
        raise BadInputError(Mistake(key="--to", message=message)) from error
