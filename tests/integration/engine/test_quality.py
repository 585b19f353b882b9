"""Quality metrics from the worker to reports, and thresholds that fail a job without changing its fingerprint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from sdpipeline import cli
from sdpipeline.demo.scenes import COLOURS, Item, draw
from sdpipeline.domain import Json
from sdpipeline.engine import quality as scores
from tests.integration.commands import FAKE_ENGINE

CAMPAIGN = """\
name: measured
checkpoint: shapes
defaults: {width: 256, height: 256, num_inference_steps: 2}
QUALITY
stages:
  - {id: draft, task: text-to-image, prompt: a red circle}
  - id: scene
    task: text-to-image
    prompt: x
    controlnets: [{checkpoint: shapes-canny, image: {file: star.png}, annotator: canny}]
"""


@dataclass(frozen=True, slots=True)
class Desk:
    """A folder with a campaign file and its input picture, and the command line in this process."""

    folder: Path
    capsys: pytest.CaptureFixture[str]

    def run(self, *words: object, exit_code: int = 0) -> Any:
        """The JSON document of one command."""
        self.capsys.readouterr()
        assert cli.run([*map(str, words), "--home", str(self.folder / "home"), "--json"]) == exit_code
        return json.loads(self.capsys.readouterr().out)

    def submit(self, quality: str = "", text: str = CAMPAIGN) -> Any:
        """Submit the campaign with these thresholds."""
        file = self.folder / "measured.yaml"
        file.write_text(text.replace("QUALITY", quality))
        return self.run("submit", file)

    def work(self, *, exit_code: int = 0) -> list[Json]:
        """Work until no job is left; return the jobs."""
        self.run("worker", "--until-idle", exit_code=exit_code)
        return list(self.run("jobs", "measured")["jobs"])


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(FAKE_ENGINE, "0")
    star = Item(colour="yellow", shape="star", x=0.4, y=0.6, radius=0.3)
    Image.fromarray(draw([star], COLOURS, background=COLOURS["blue"], side=256)).save(tmp_path / "star.png")
    return Desk(tmp_path, capsys)


def picture_file(job: Json) -> Path:
    return Path(unquote(urlsplit(job["image"]["url"]).path))


def sidecar(job: Json) -> Json:
    (file,) = picture_file(job).parent.glob(f"{job['image']['sha256']}.*.json")
    found: Json = json.loads(file.read_text())
    return found


def test_every_picture_has_its_scores_in_row_sidecar_and_audit_log(desk: Desk) -> None:
    desk.submit()
    draft, scene = desk.work()
    assert set(draft["image"]["scores"]) == {"sharpness", "perceptual_hash"}
    assert set(scene["image"]["scores"]) == {"sharpness", "perceptual_hash", "edge_agreement"}
    for job in (draft, scene):
        measured, pixels = job["image"]["scores"], np.asarray(Image.open(picture_file(job)).convert("RGB"))
        assert measured["sharpness"] == scores.sharpness(pixels)
        assert measured["perceptual_hash"] == scores.perceptual_hash(pixels)
        assert sidecar(job)["scores"] == measured
        assert sidecar(job)["timings"]["measure_s"] > 0
        (told,) = [event for event in desk.run("show", job["id"])["events"] if event["event"] == "job.succeeded"]
        assert told["image"]["scores"] == measured
    assert desk.run("audit", "verify")["faults"] == []


def test_a_picture_below_a_threshold_fails_its_job_and_a_lowered_one_lets_it_be_made(desk: Desk) -> None:
    desk.submit("quality: {min_edge_agreement: 0.9}")
    draft, scene = desk.work(exit_code=3)
    assert (draft["status"], scene["status"], scene["attempts"]) == ("succeeded", "failed", 1)
    assert scene["error"].startswith("its edge_agreement 0.")
    assert "is less than min_edge_agreement 0.9 (a retry makes the same picture: lower quality." in scene["error"]
    assert desk.run("show", scene["id"])["error_kind"] == "BadPicture"
    done = desk.submit("quality: {min_edge_agreement: 0.0}")
    assert (done["added"], done["unchanged"]) == (0, 2)
    assert desk.run("retry", "measured")["retried"] == 1
    again = desk.work()
    assert [(job["status"], job["fingerprint"]) for job in again] == [
        ("succeeded", job["fingerprint"]) for job in (draft, scene)
    ]


def test_a_raised_threshold_is_published_and_makes_nothing_again(desk: Desk) -> None:
    desk.submit()
    before = desk.work()
    assert desk.submit("quality: {min_sharpness: 1000000}")["version"] == 2
    assert desk.work() == before


def test_a_stages_own_thresholds_replace_the_campaigns(desk: Desk) -> None:
    text = CAMPAIGN.replace("id: draft", "id: draft, quality: {}")
    desk.submit("quality: {min_sharpness: 1000000}", text)
    draft, scene = desk.work(exit_code=3)
    assert (draft["status"], scene["status"]) == ("succeeded", "failed")
    assert "is less than min_sharpness 1e+06" in scene["error"]
