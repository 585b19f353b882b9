"""`init` and `schema` at the real command line: the files they write are valid, and the example runs."""

from __future__ import annotations

import json
import os
import shlex
import stat
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from sdpipeline import cli
from sdpipeline.app import scaffold
from sdpipeline.campaigns import yaml_source
from tests.integration.commands import FAKE_ENGINE, sdpipeline


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder created by `init`."""
    folder = tmp_path / "begun"
    assert cli.run(["init", str(folder)]) == 0
    monkeypatch.chdir(folder)
    return folder


def test_init_says_what_it_wrote_and_what_to_type_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["init", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    written = sorted(path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*.*"))
    assert written == sorted(scaffold.files())
    assert [name for name in written if name not in said] == []
    assert "sdpipeline run catalogue.yaml" in said
    assert "cd " in said


def test_the_settings_file_is_its_owners_alone_and_the_examples_are_not(begun: Path) -> None:
    modes = {name: stat.S_IMODE((begun / name).stat().st_mode) for name in ("sdpipeline.toml", "catalogue.yaml")}
    before = os.umask(0)
    os.umask(before)
    assert modes == {"sdpipeline.toml": 0o600, "catalogue.yaml": 0o666 & ~before}


def test_init_a_second_time_is_refused_with_every_file_named(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (begun / "sdpipeline.toml").write_text("team = 'mine'\n")
    capsys.readouterr()
    assert cli.run(["init"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == len(scaffold.files())
    assert (begun / "sdpipeline.toml").read_text() == "team = 'mine'\n"
    assert cli.run(["init", "--force"]) == 0
    assert (begun / "sdpipeline.toml").read_text() == scaffold.settings_file()


def test_the_schema_printed_is_the_one_written_and_takes_the_examples(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert cli.run(["schema"]) == 0
    printed = capsys.readouterr().out
    assert (begun / scaffold.SCHEMA_NAME).read_text(encoding="utf-8") == printed
    for name in scaffold.CAMPAIGNS:
        Draft202012Validator(json.loads(printed)).validate(yaml_source.load(begun / name).data)


@pytest.mark.timeout(240)
def test_every_example_passes_plan_runs_to_its_end_and_is_exported(
    begun: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*words: str) -> Any:
        capsys.readouterr()
        assert cli.run([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    monkeypatch.setenv("SDP_HOME", str(begun / "home"))
    planned = {name: said("plan", name)["jobs"]["total"] for name in scaffold.CAMPAIGNS}
    assert all(0 < count <= 24 for count in planned.values())
    for name in scaffold.CAMPAIGNS:
        assert said("submit", name)["added"] == planned[name]
    assert sdpipeline("worker", "--until-idle", "--home", begun / "home", **{FAKE_ENGINE: "0"}).returncode == 0
    made = {f"{each['name']}.yaml": each["jobs"]["succeeded"] for each in said("status")["campaigns"]}
    assert made == planned
    for name in scaffold.CAMPAIGNS:
        # The command named in the example's own comment.
        (line,) = [line for line in (begun / name).read_text().splitlines() if "sdpipeline export" in line]
        done = said(*shlex.split(line.partition("sdpipeline ")[2]))
        assert done["copied"] > 0
        assert done["without_picture"] == 0
