"""Completeness of the documentation: every command, option, setting and campaign key, and a successful build."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from sdpipeline.campaigns.spec_part import SpecPart
from sdpipeline.cli import application
from sdpipeline.engine import annotators, families
from sdpipeline.settings import setting_names

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
COMMANDS = (REFERENCE / "commands.md").read_text(encoding="utf-8")
SETTINGS = (REFERENCE / "settings.md").read_text(encoding="utf-8")
KEYS = (REFERENCE / "campaign-file.md").read_text(encoding="utf-8")
CELLS = (REFERENCE / "tasks-and-families.md").read_text(encoding="utf-8")
EVERYWHERE = {"--home", "--json", "--help"}


def _commands(group: TyperGroup, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
            yield f"{prefix}{name}", [option for option in options if option not in EVERYWHERE]


def _all_commands() -> list[tuple[str, list[str]]]:
    group = typer.main.get_command(application())
    assert isinstance(group, TyperGroup)
    return list(_commands(group))


@pytest.mark.parametrize(("name", "options"), _all_commands())
def test_every_command_stands_in_the_table_with_its_options(name: str, options: list[str]) -> None:
    lines = [line for line in COMMANDS.splitlines() if line.startswith("|") and f"`{name}" in line]
    assert lines, f"{name} is not in docs/reference/commands.md"
    assert [option for option in options if not any(option in line for line in lines)] == []


@pytest.mark.parametrize("name", setting_names())
def test_every_setting_stands_in_the_table_with_its_meaning_and_default(name: str) -> None:
    meaning, default = setting_names()[name]
    shown = "" if default in (None, {}, []) else f"`{default}`"
    assert f"| `{name}` | {meaning} | {shown} |" in SETTINGS


def _models() -> list[type[SpecPart]]:
    direct = SpecPart.__subclasses__()
    return [*direct, *(below for model in direct for below in model.__subclasses__())]


@pytest.mark.parametrize("model", _models())
def test_every_campaign_key_stands_in_its_reference(model: type[SpecPart]) -> None:
    assert [name for name in model.model_fields if f"{name}" not in KEYS] == []


def test_the_table_of_families_is_the_one_the_engine_runs_by() -> None:
    assert families.table().strip() in CELLS


@pytest.mark.parametrize("name", [*families.SCHEDULERS, *annotators.ANNOTATORS])
def test_every_scheduler_and_annotator_is_named(name: str) -> None:
    assert f"`{name}`" in CELLS


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    own = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").is_file()


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
def test_every_link_of_the_readme_leads_to_a_file(target: str) -> None:
    assert (ROOT / target).exists()
