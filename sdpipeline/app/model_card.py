"""Licence and source of weights, as their own folder states them: model card, licence file, safetensors metadata."""

from __future__ import annotations

import configparser
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sdpipeline.engine.classification import read_header
from sdpipeline.errors import CheckpointError

LONGEST = 200
"""Characters of a licence or source that are kept: a model card is written by strangers."""

_READ_BYTES = 65536
_CARDS = ("README.md", "readme.md", "README.MD", "MODEL_CARD.md", "model_card.md")
_FRONT_MATTER = re.compile(r"\A﻿?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_LICENCE_FILE = re.compile(r"(.*[-_ .])?(licen[cs]e|copying)([-_ .].*)?", re.IGNORECASE)
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})")

HEADINGS: Mapping[str, str] = {
    "flux.1 [dev] non-commercial license": "flux-1-dev-non-commercial-license",
    "flux non-commercial license": "flux-non-commercial-license",
    "stability ai community license": "stabilityai-ai-community",
    "stability community license": "stabilityai-ai-community",
    "stability ai non-commercial research community license": "sai-nc-community",
    "stabilityai non-commercial research community license": "sai-nc-community",
    "creativeml open rail++-m": "openrail++",
    "creativeml open rail++": "openrail++",
    "creativeml open rail-m": "creativeml-openrail-m",
    "bigscience open rail-m": "bigscience-openrail-m",
    "fair ai public license 1.0-sd": "faipl-1.0-sd",
    "apache license": "apache-2.0",
    "mit license": "mit",
    "permission is hereby granted, free of charge": "mit",
    "gnu affero general public license": "agpl-3.0",
    "gnu lesser general public license": "lgpl-3.0",
    "gnu general public license": "gpl-3.0",
    "creative commons zero": "cc0-1.0",
    "cc0 1.0 universal": "cc0-1.0",
    "attribution-noncommercial-noderivatives 4.0": "cc-by-nc-nd-4.0",
    "attribution-noncommercial-sharealike 4.0": "cc-by-nc-sa-4.0",
    "attribution-noncommercial 4.0": "cc-by-nc-4.0",
    "attribution-sharealike 4.0": "cc-by-sa-4.0",
    "attribution 4.0 international": "cc-by-4.0",
    "bsd 3-clause": "bsd-3-clause",
}
"""Licences by a phrase of the first lines of their text, under the names that model cards use.

SPDX's list, which libraries match texts against, has none of the licences that are usual for weights.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """Statements of a folder about its weights; None for each that it does not make."""

    licence: str | None = None
    source: str | None = None
    base_model: str | None = None


def read_model_card(directory: Path) -> ModelCard:
    """Read the licence and the source of weights from their folder. Never raises: a model card is optional."""
    front = _front_matter(directory)
    licence = _licence(front) or _licence_text(directory) or _metadata_licence(directory)
    base = front.get("base_model")
    return ModelCard(
        licence=licence,
        source=_source(directory),
        base_model=_line(base[0] if isinstance(base, list) and base else base),
    )


def _front_matter(directory: Path) -> Mapping[str, Any]:
    for name in _CARDS:
        if found := _FRONT_MATTER.match(_text(directory / name)):
            try:
                document = yaml.safe_load(found[1])
            except (yaml.YAMLError, RecursionError, ValueError):
                return {}
            return document if isinstance(document, dict) else {}
    return {}


def _licence(front: Mapping[str, Any]) -> str | None:
    """Return the licence of a model card; its own name if the card says ``license: other``."""
    given = front.get("license")
    names = [line for each in (given if isinstance(given, list) else [given]) if (line := _line(each))]
    own = _line(front.get("license_name"))
    if own and (not names or names == ["other"]):
        return own
    return " or ".join(names)[:LONGEST] or None


def _licence_text(directory: Path) -> str | None:
    for path in _licence_files(directory):
        text = " ".join(_text(path)[:2000].lower().split())
        places = {text.find(phrase): name for phrase, name in reversed(list(HEADINGS.items())) if phrase in text}
        if places:
            return places[min(places)]
    return None


def _licence_files(directory: Path) -> Iterator[Path]:
    try:
        names = sorted(path.name for path in directory.iterdir())
    except OSError:
        return
    yield from (directory / name for name in names if _LICENCE_FILE.fullmatch(name))


def _metadata_licence(directory: Path) -> str | None:
    """Return the licence in the header of a single weights file, under the key of the ModelSpec standard."""
    try:
        names = sorted(path.name for path in directory.iterdir() if path.suffix == ".safetensors")
        if len(names) == 1:
            return _line(read_header("", directory / names[0]).metadata.get("modelspec.license"))
    except (OSError, CheckpointError):
        return None
    return None


def _source(directory: Path) -> str | None:
    """Return the repository and commit of a folder that a hub's client or git downloaded; None for any other."""
    if found := _SNAPSHOT.search(directory.as_posix()):
        return f"{found[1]}/{found[2]}@{found[3]}"
    config = configparser.ConfigParser(strict=False, interpolation=None)
    try:
        config.read_string(re.sub(r"^\s+", "", _text(directory / ".git" / "config"), flags=re.MULTILINE))
        url = config.get('remote "origin"', "url", fallback=None)
    except configparser.Error:
        return None
    if not (url := _line(url)):
        return None
    url = re.sub(r"//[^/@]*@", "//", url)  # a token in the address of a private repository
    return f"{url}@{commit}" if (commit := _commit(directory / ".git")) else url


def _commit(git: Path) -> str | None:
    head = _text(git / "HEAD").strip()
    name = head.removeprefix("ref: ")
    if name != head:
        head = _text(git / name).strip() if re.fullmatch(r"refs/[\w./-]+", name) and ".." not in name else ""
    return head if re.fullmatch(r"[0-9a-f]{40}", head) else None


def _text(path: Path) -> str:
    try:
        if not path.is_file():  # a FIFO would never end
            return ""
        with path.open("rb") as file:
            return file.read(_READ_BYTES).decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return ""


def _line(value: Any) -> str | None:
    """Return a value as one short printable line; None if it is no text."""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return None
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return text[:LONGEST] or None
