"""Frequently used commands import only the packages they need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sdpipeline import cli

CAMPAIGN = """\
name: spring
checkpoint: shapes
stages: [{id: draft, task: text-to-image, prompt: a red circle}]
"""
HEAVY = {
    "PIL",
    "alembic",
    "boto3",
    "c2pa",
    "cv2",
    "diffusers",
    "jinja2",
    "numpy",
    "prefect",
    "torch",
}
SETTINGS_AND_SQL = {"pydantic", "sqlalchemy", "structlog"}
IMPORTED_BY = """\
import json, sys
from sdpipeline import cli
found = {}
for words in json.loads(sys.argv[1]):
    code = cli.run(words)
    assert code == 0, (words, code)
    found[words[0]] = sorted({name.partition(".")[0] for name in sys.modules})
sys.stderr.write(json.dumps(found))
"""


def imported_by(*commands: list[str]) -> dict[str, set[str]]:
    """Packages imported after each of the commands, run one after the other in a fresh interpreter."""
    ran = subprocess.run(
        [sys.executable, "-c", IMPORTED_BY, json.dumps(commands)], check=True, capture_output=True, text=True
    )
    return {command: set(names) for command, names in json.loads(ran.stderr).items()}


@pytest.fixture
def home(tmp_path: Path) -> str:
    """An embedded home with a submitted campaign."""
    (tmp_path / "spring.yaml").write_text(CAMPAIGN)
    assert cli.run(["submit", str(tmp_path / "spring.yaml"), "--home", str(tmp_path / "home")]) == 0
    return str(tmp_path / "home")


def test_commands_that_show_and_control_jobs_import_neither_an_engine_nor_alembic(home: str) -> None:
    words = (
        ["status"],
        ["jobs", "spring"],
        ["show", "1"],
        ["pause", "spring"],
        ["resume", "spring"],
        ["cancel", "spring"],
        ["retry", "spring", "--status", "cancelled"],
    )
    found = imported_by(*([*command, "--home", home] for command in words))
    assert {command: names & HEAVY for command, names in found.items()} == {each[0]: set() for each in words}


def test_the_version_is_printed_without_settings_and_sql() -> None:
    found = imported_by(["--version"])
    assert found["--version"] & (HEAVY | SETTINGS_AND_SQL) == set()
