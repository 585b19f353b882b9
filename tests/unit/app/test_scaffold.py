"""``init``: the files it writes in a temporary folder."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdpipeline import settings
from sdpipeline.app import scaffold
from sdpipeline.errors import BadInputError
from sdpipeline.settings import TOML_NAME, setting_names


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and an environment without settings."""
    for name in list(os.environ):
        if name.upper().startswith("SDP_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_settings_file_changes_nothing_as_it_is(folder: Path) -> None:
    before = settings.load()
    (folder / TOML_NAME).write_text(scaffold.settings_file(), encoding="utf-8")
    assert settings.load() == before


def test_the_settings_file_names_every_setting_with_its_meaning() -> None:
    text = scaffold.settings_file()
    for description, _ in setting_names().values():
        assert f"\n# {description}\n# " in text


def test_taking_away_the_number_signs_sets_every_default(folder: Path) -> None:
    before = settings.load()
    text = re.sub(r"(?m)^# (?=\w+ = )", "", scaffold.settings_file())
    given = {name for name, (_, default) in setting_names().items() if default is not None}
    assert {f"SDP_{name.upper()}" for name in _names(tomllib.loads(text))} == given
    (folder / TOML_NAME).write_text(text, encoding="utf-8")
    assert settings.load() == before


def _names(document: dict[str, Any]) -> Iterator[str]:
    for name, value in document.items():
        if name in ("s3", "inputs", "engine", "signing", "retention", "dispatch", "gateway"):
            yield from (f"{name}__{inner}" for inner in value)
        else:
            yield name


def test_a_file_that_is_there_is_named_and_nothing_is_written(folder: Path) -> None:
    for name in ("grid.yaml", "products.tsv"):
        (folder / name).write_text("mine")
    with pytest.raises(BadInputError) as refused:
        scaffold.write(folder)
    said = [str(mistake) for mistake in refused.value.mistakes]
    fix = "(name another folder, or overwrite with --force)"
    assert said == [f"{folder / name} already exists {fix}" for name in ("grid.yaml", "products.tsv")]
    assert sorted(path.name for path in folder.iterdir()) == ["grid.yaml", "products.tsv"]


def test_force_overwrites_what_is_there_and_leaves_everything_else(folder: Path) -> None:
    (folder / "grid.yaml").write_text("mine")
    (folder / "other.yaml").write_text("mine")
    assert scaffold.write(folder, force=True) == list(scaffold.files())
    assert (folder / "grid.yaml").read_bytes() == scaffold.files()["grid.yaml"]
    assert (folder / "other.yaml").read_text() == "mine"
