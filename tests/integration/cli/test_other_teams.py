"""Look-ups by id, key, picture or campaign: an object of another team is answered like one that does not exist."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdpipeline import cli
from tests.integration.commands import FAKE_ENGINE

CAMPAIGN = """\
name: secret-launch
checkpoint: shapes
defaults: {width: 64, height: 64, num_inference_steps: 2, guidance_scale: 1.0}
stages: [{id: hidden, task: text-to-image, prompt: "a red circle of nobody else"}]
"""
GIVEN_AWAY = ("secret-launch", "hidden", "nobody else", "east")


@dataclass(frozen=True)
class Teams:
    """A home with one picture of the team ``east``, and the command line in this process as ``west``."""

    folder: Path
    picture: Path
    key: str
    capsys: pytest.CaptureFixture[str]

    def said(self, *words: object) -> tuple[int, str]:
        self.capsys.readouterr()
        code = cli.run([*map(str, words), "--home", str(self.folder / "home")])
        said = self.capsys.readouterr()
        return code, said.out + said.err


@pytest.fixture
def teams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Teams:
    monkeypatch.setenv(FAKE_ENGINE, "0")
    monkeypatch.setenv("SDP_TEAM", "east")
    (tmp_path / "east.yaml").write_text(CAMPAIGN)
    nothing = Teams(tmp_path, tmp_path, "", capsys)
    assert nothing.said("submit", tmp_path / "east.yaml")[0] == 0
    assert nothing.said("worker", "--until-idle")[0] == 0
    made = next((tmp_path / "home" / "storage" / "east").rglob("*.png"))
    key = made.relative_to(tmp_path / "home" / "storage").as_posix()
    assert nothing.said("show", 1)[0] == nothing.said("audit", "prove", key, "--out", tmp_path / "own")[0] == 0
    # A copy without marks does not identify itself: only the database could.
    copy = tmp_path / "copy.png"
    copy.write_bytes(made.read_bytes())
    monkeypatch.setenv("SDP_TEAM", "west")
    return Teams(tmp_path, copy, key, capsys)


@pytest.mark.parametrize("command", [["show"], ["show", "--json"], ["reproduce"], ["audit", "prove"]])
def test_another_teams_job_is_an_unknown_job(teams: Teams, command: list[str]) -> None:
    code, said = teams.said(*command, 1)
    assert code == 2
    assert (code, said.replace("job 1", "job 7")) == teams.said(*command, 7)


@pytest.mark.parametrize(
    "command", ["jobs", "retry", "cancel", "pause", "resume", "status", "export --to x", "export --to x --stage hidden"]
)
def test_another_teams_campaign_is_an_unknown_campaign(teams: Teams, command: str) -> None:
    word, *options = command.split()
    code, said = teams.said(word, "secret-launch", *options)
    assert code == 2
    assert (code, said.replace("secret-launch", "nothing")) == teams.said(word, "nothing", *options)


def test_another_teams_picture_is_proven_to_nobody_else(teams: Teams) -> None:
    code, said = teams.said("audit", "prove", teams.key)
    assert (code, said.replace(teams.key, "east/x.png")) == teams.said("audit", "prove", "east/x.png")
    code, said = teams.said("audit", "prove", teams.picture)
    assert code == 2
    assert "the audit log has no picture" in said
    assert not any(word in said for word in GIVEN_AWAY)


def test_the_database_knows_another_teams_picture_by_its_own_marks_alone(teams: Teams) -> None:
    _, said = teams.said("verify", teams.picture, "--json")
    found = json.loads(said)
    assert (found["known"], found["match"], found["faults"]) == (False, None, [])


def test_an_auditor_reads_all_teams(teams: Teams) -> None:
    code, said = teams.said("audit", "verify", "--json")
    found = json.loads(said)
    assert (code, found["ok"], found["images"]) == (0, True, 1)
