"""The base install has no engine: commands that need one fail at once, and nothing is written."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sdpipeline import cli
from sdpipeline.app import factories

CAMPAIGN = """\
name: spring
checkpoint: shapes
stages: [{id: draft, task: text-to-image, prompt: a red circle}]
"""


@pytest.mark.parametrize("package", ["torch", "peft"])
@pytest.mark.parametrize("command", ["run", "demo", "worker"])
def test_a_missing_part_of_the_engine_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, package: str
) -> None:
    (tmp_path / "spring.yaml").write_text(CAMPAIGN)
    monkeypatch.setitem(sys.modules, package, None)  # the value that Python finds for a package that is not installed
    files = [str(tmp_path / "spring.yaml")] if command == "run" else []
    assert cli.run([command, *files, "--home", str(tmp_path / "home")]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"this machine cannot generate pictures: no {package} (pip install 'sdpipeline[engine]')" in told
    assert not (tmp_path / "home").exists()


def test_every_package_of_the_extra_is_looked_for() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    wanted = {canonicalize_name(Requirement(each).name) for each in project["optional-dependencies"]["engine"]}
    known = packages_distributions()
    assert {canonicalize_name(known[package][0]) for package in factories.ENGINE_PACKAGES} == wanted
