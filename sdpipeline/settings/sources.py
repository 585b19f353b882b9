"""Sources of settings: the environment, ``.env`` and the nearest ``sdpipeline.toml``."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dotenv import dotenv_values
from pydantic import BaseModel
from pydantic_settings import TomlConfigSettingsSource

from sdpipeline.errors import Mistake, SettingsError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_settings import BaseSettings

PREFIX = "SDP_"
TEST_PREFIX = "SDP_TEST_"
TOML_NAME = "sdpipeline.toml"
LARGEST_SETTINGS_FILE = 2**20


def find_toml(start: Path) -> Path | None:
    """Return the nearest ``sdpipeline.toml``, walking up from ``start``."""
    return next((p / TOML_NAME for p in (start, *start.parents) if (p / TOML_NAME).is_file()), None)


class NearestToml(TomlConfigSettingsSource):
    """Settings source of the nearest ``sdpipeline.toml``.

    A path in it is relative to the file, which may lie far above the working folder.
    """

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        self._path = find_toml(Path.cwd())
        super().__init__(settings_cls, toml_file=self._path)

    def __call__(self) -> dict[str, Any]:
        """Return the file's settings, with absolute paths."""
        document = super().__call__()
        if self._path is not None:
            for name, (info, _) in fields_by_name(self.settings_cls).items():
                if Path in (info.annotation, *get_args(info.annotation)):
                    _rebase(document, toml_keys(name), self._path.parent)
        return document


def _rebase(document: dict[str, Any], keys: list[str], folder: Path) -> None:
    *outer, last = keys
    for key in outer:
        inner = document.get(key)
        if not isinstance(inner, dict):
            return
        document = inner
    if isinstance(document.get(last), str):
        document[last] = folder / Path(document[last]).expanduser()


def toml_keys(name: str) -> list[str]:
    """Return the keys of an ``SDP_`` name in ``sdpipeline.toml``: its sections, then its own key."""
    return name.removeprefix(PREFIX).lower().split("__")


def fields_by_name(model: type[BaseModel], prefix: str = PREFIX) -> dict[str, tuple[FieldInfo, Any]]:
    """Return every setting's field and default by its ``SDP_`` name."""
    found: dict[str, tuple[FieldInfo, Any]] = {}
    for name, info in model.model_fields.items():
        default = info.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            found |= fields_by_name(type(default), f"{prefix}{name.upper()}__")
        else:
            found[f"{prefix}{name.upper()}"] = (info, default)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenSetting:
    """Setting as a user wrote it: its location, its spelling and the ``SDP_`` name that it stands for."""

    file: str
    line: int | None
    written: str
    name: str
    value: str | None = field(default=None, repr=False)


def written_settings(cwd: Path) -> list[WrittenSetting]:
    """Return every ``SDP_`` name in force, the strongest source first."""
    found = [
        WrittenSetting(file="the environment", line=None, written=name, name=name.upper(), value=value)
        for name, value in os.environ.items()
    ]
    found += _in_dotenv(cwd / ".env")
    found = [each for each in found if each.name.startswith(PREFIX) and not each.name.startswith(TEST_PREFIX)]
    path = find_toml(cwd)
    return found + (_in_toml(path) if path else [])


def _in_dotenv(path: Path) -> list[WrittenSetting]:
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(Mistake(file=".env", message=f"cannot be read: {error}")) from error
    lines = {}
    for n, line in enumerate(text.splitlines(), 1):
        lines[line.partition("=")[0].strip().removeprefix("export ").strip().strip("'\"")] = n
    values = dotenv_values(stream=StringIO(text))
    return [
        WrittenSetting(file=".env", line=lines.get(name), written=name, name=name.upper(), value=value)
        for name, value in values.items()
    ]


def _in_toml(path: Path) -> list[WrittenSetting]:
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > LARGEST_SETTINGS_FILE:
            raise SettingsError(Mistake(file=str(path), message="is larger than 1 MiB, the limit for settings files"))
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r" \(at line (\d+), column (\d+)\)", str(error))
        line, column = (int(place[1]), int(place[2])) if place else (None, None)
        message = f"is not TOML: {str(error)[: place.start()] if place else error}"
        raise SettingsError(Mistake(file=str(path), line=line, column=column, message=message)) from error
    except (RecursionError, MemoryError) as error:
        raise SettingsError(Mistake(file=str(path), message="is not TOML: it is nested too deeply")) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(Mistake(file=str(path), message=f"cannot be read: {error}")) from error
    lines = _toml_lines(text)
    found = []
    for key in _keys_of(document):
        line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
        name = PREFIX + "__".join(key).upper()
        found.append(WrittenSetting(file=str(path), line=line, written=".".join(key), name=name))
    return found


def _toml_lines(text: str) -> dict[tuple[str, ...], int]:
    """Return the line of each key of a valid TOML text; a key inside a value has the value's line."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for n, line in enumerate(text.splitlines(), 1):
        if heading := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
            table = _dotted_key(heading[1])
            lines.setdefault(table, n)
        elif "=" in line:
            lines.setdefault((*table, *_dotted_key(line.partition("=")[0])), n)
    return lines


def _dotted_key(text: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("'\"") for part in text.split("."))


def _keys_of(document: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    keys: list[tuple[str, ...]] = []
    for name, value in document.items():
        keys += _keys_of(value, (*prefix, name)) if isinstance(value, dict) and value else [(*prefix, name)]
    return keys
