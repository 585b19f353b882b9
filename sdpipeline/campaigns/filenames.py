"""File names of exported pictures: from a template, or a readable and unique default."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sdpipeline.campaigns.templates import TemplateRefusedError, compile_template
from sdpipeline.suggestions import nearest

MANIFEST = "manifest.csv"
EXTENSIONS: Mapping[str, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}
"""File extension by output format."""

LONGEST_PART_BYTES = 255
LONGEST_NAME_BYTES = 1024
LONGEST_WORD_BYTES = 60
LONGEST_STEM_BYTES = 200
"""Bounds of generated names; they leave room for a number and an extension."""

_FORBIDDEN = re.compile(r'[\\<>:"|?*]')
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


class WrongNameError(ValueError):
    """A template renders no valid file name for a picture; ``fix`` says what to write."""

    def __init__(self, message: str, fix: str | None = None) -> None:
        super().__init__(message)
        self.fix = fix


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Values that a picture's name may use; ``axes`` are the variables that distinguish it from others of its row."""

    id: int
    stage: str
    row: str
    seed: int
    edition: str
    axes: Mapping[str, Any]
    variables: Mapping[str, Any]
    extension: str

    def values(self) -> dict[str, Any]:
        """Return everything a template may use; a campaign's own variable overrides a built-in name."""
        own = {"id": self.id, "stage": self.stage, "row": self.row, "seed": self.seed, "edition": self.edition}
        return own | dict(self.variables)


Naming = Callable[[Subject], str]
"""Function that returns a picture's path inside the folder; raises WrongNameError."""


def by_template(text: str) -> Naming:
    """Name pictures by a template over :meth:`Subject.values`; slashes make sub-folders."""
    try:
        template = compile_template(text)
    except TemplateRefusedError as error:
        raise WrongNameError(str(error)) from error

    def name(subject: Subject) -> str:
        values = subject.values()
        try:
            stem = str(template.render(values))
        except TemplateRefusedError as error:
            unknown = sorted(template.names - set(values))
            if not unknown:
                raise WrongNameError(f"{error}, for job {subject.id}") from error
            message = f"job {subject.id} of stage {subject.stage!r} has no variable {unknown[0]!r}"
            raise WrongNameError(message, nearest(unknown[0], values)) from error
        ending = f".{subject.extension}"
        file = stem if stem.lower().endswith(ending) else stem + ending
        if why := refusal(file):
            fix = "an expression such as {{ name|replace(':', '-') }} leaves characters out"
            raise WrongNameError(f"{stem!r} {why}, for job {subject.id}", fix)
        return file

    return name


def by_default(*, keyed: bool, stage_folders: bool) -> Naming:
    """Name pictures by row, remaining variables and seed. Two names may collide after characters are replaced or cut.

    ``keyed`` means that rows have keys of their own; otherwise their values are more readable than their hash.
    """

    def name(subject: Subject) -> str:
        words = [subject.row] if keyed else [*_cells(subject), subject.row]
        words += [_text(value) for _, value in sorted(subject.axes.items())]
        stem = "-".join([*filter(None, map(_word, words)), str(subject.seed)])
        folders = filter(None, [subject.edition, subject.stage if stage_folders else ""])
        return "/".join(map(_unreserved, [*folders, f"{_cut(stem, LONGEST_STEM_BYTES)}.{subject.extension}"]))

    return name


def numbered(file: str, job_id: int) -> str:
    """Make a default name unique that another job has too; no other default name contains ``~``."""
    stem, _, ending = file.rpartition(".")
    return f"{stem}~{job_id}.{ending}"


def refusal(file: str) -> str | None:
    """Return why the path is invalid on some platform, or ``None`` if it is valid."""
    parts = file.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "is not a path inside the folder"
    if not file.isprintable():
        return "holds a control character"
    if found := _FORBIDDEN.search(file):
        return f"holds the character {found[0]}"
    if any(part.startswith((".", " ")) or part.endswith((".", " ")) for part in parts):
        return "begins or ends with a dot or a space"
    if any(_RESERVED.fullmatch(part) for part in parts):
        return "is a reserved name on Windows"
    if len(file.encode()) > LONGEST_NAME_BYTES or any(len(part.encode()) > LONGEST_PART_BYTES for part in parts):
        return f"is longer than {LONGEST_PART_BYTES} bytes"
    # A folder named like a picture or the manifest would block the file of that name.
    folders = [part.lower() for part in parts[:-1]]
    if any(part == MANIFEST or part.endswith(tuple(f".{each}" for each in EXTENSIONS.values())) for part in folders):
        return "has a folder with the name of a file"
    return None


def different(one: Subject, other: Subject) -> list[str]:
    """List the template variables that would distinguish two pictures, the best first."""
    left, right = one.values(), other.values()
    differing = [name for name in left if name.isidentifier() and name in right and left[name] != right[name]]
    return sorted(differing, key=lambda name: (name == "id", name == "seed", name not in one.variables))


def _cells(subject: Subject) -> list[str]:
    return [_text(value) for name, value in sorted(subject.variables.items()) if name not in subject.axes]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _word(text: str) -> str:
    return _cut(re.sub(r"[^\w.]+", "-", text), LONGEST_WORD_BYTES)


def _unreserved(part: str) -> str:
    return f"_{part}" if _RESERVED.fullmatch(part) else part


def _cut(text: str, most_bytes: int) -> str:
    return text.encode()[:most_bytes].decode(errors="ignore").strip("-.")
