"""Defaults of checkpoints from registration to a campaign's jobs, and across an upgrade."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import null, update

from sdpipeline.app import checkpoints, services
from sdpipeline.db.tables import checkpoint
from tests.factories import events
from tests.integration.commands import document, sdpipeline
from tests.integration.distilled_checkpoints import TURBO_SCHEDULER, with_scheduler

CAMPAIGN = """\
name: quick
checkpoint: {alias}
stages: [{{id: draft, task: text-to-image, prompt: a red circle{more}}}]
"""
TURBO = {"num_inference_steps": 4, "guidance_scale": 0.0, "scheduler": "euler-trailing"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def turbo(home: Path) -> Path:
    """A checkpoint of the deployment's folder with the scheduler of SDXL-Turbo."""
    folder = home / "checkpoints" / "mine"
    shutil.copytree(checkpoints.BUILTIN_CHECKPOINTS / "shapes", folder)
    with_scheduler(folder, TURBO_SCHEDULER)
    return folder


def _campaign(tmp_path: Path, alias: str, more: str = "") -> Path:
    file = tmp_path / "campaign.yaml"
    file.write_text(CAMPAIGN.format(alias=alias, more=more))
    return file


def _row(home: Path, alias: str) -> Any:
    return next(r for r in document("checkpoints", "list", "--home", home)["checkpoints"] if r["alias"] == alias)


def _request(home: Path, job: int = 1) -> Any:
    return document("show", job, "--home", home)["request"]


def _as_before_the_upgrade(home: Path) -> None:
    """Empty the columns that the previous release did not write."""
    with services.open_services(services.load_settings(home)) as have, have.audit.transaction() as tx:
        tx.connection.execute(update(checkpoint).values(native_size=null(), defaults=null()))


def test_a_checkpoint_of_the_folder_is_used_and_recorded_with_its_detected_defaults(
    tmp_path: Path, home: Path, turbo: Path
) -> None:
    assert _row(home, "mine")["defaults"] == TURBO
    document("submit", _campaign(tmp_path, "mine"), "--home", home)
    assert TURBO.items() <= _request(home).items()
    assert _row(home, "mine")["defaults"] == TURBO
    with services.open_services(services.load_settings(home)) as have:
        assert TURBO in [event.get("defaults") for event in events(have.database)]


def test_weights_that_an_earlier_release_used_make_nothing_anew(tmp_path: Path, home: Path, turbo: Path) -> None:
    document("checkpoints", "add", "mine", turbo, "--home", home)
    _as_before_the_upgrade(home)
    file = _campaign(tmp_path, "mine")
    document("submit", file, "--home", home)
    request = _request(home)
    assert (request["num_inference_steps"], request["guidance_scale"], request["scheduler"]) == (25, 7.5, "dpmpp-2m")
    assert (request["width"], request["height"]) == (512, 512)
    warned = [each["message"] for each in document("plan", file, "--home", home)["warnings"]]
    assert warned[0] == "25 is far from 4, for which 'mine' is made"
    renewed = sdpipeline("checkpoints", "add", "mine", turbo, "--licence", "Apache-2.0", "--home", home)
    assert "keeps its earlier defaults; --defaults auto sets num_inference_steps=4" in renewed.stdout
    assert document("plan", file, "--home", home)["jobs"]["new"] == 0
    document("checkpoints", "add", "mine", turbo, "--defaults", "auto", "--home", home)
    assert document("plan", file, "--home", home)["jobs"]["new"] == 1


def test_shipped_checkpoints_keep_their_size_and_defaults(tmp_path: Path, home: Path) -> None:
    assert (_row(home, "shapes")["native_size"], _row(home, "shapes")["defaults"]) == (None, {})
    document("submit", _campaign(tmp_path, "shapes"), "--home", home)
    assert (_request(home)["width"], _request(home)["num_inference_steps"]) == (512, 25)


def test_shipped_checkpoints_warn_of_a_size_far_from_that_of_their_configuration(tmp_path: Path, home: Path) -> None:
    file = _campaign(tmp_path, "shapes")
    warned = [each["message"] for each in document("plan", file, "--home", home)["warnings"]]
    assert warned == ["512x512 is 16 times the area that 'shapes' is made for"]
    file.write_text(file.read_text() + "defaults: {width: 128, height: 128}\n")
    assert document("plan", file, "--home", home)["warnings"] == []
    file.write_text(file.read_text().replace("128", "64"))
    warned = [each["message"] for each in document("plan", file, "--home", home)["warnings"]]
    assert len(warned) == 1
    assert warned[0].startswith("64x64 is 0.25 times the area")


def test_given_defaults_are_listed_audited_used_and_kept_by_a_renewed_approval(
    tmp_path: Path, home: Path, turbo: Path
) -> None:
    given = ("--defaults", "lightning-8", "--defaults", "width=256", "--defaults", "height=128")
    added = document("checkpoints", "add", "fast", turbo, *given, "--home", home)
    expected = {**TURBO, "num_inference_steps": 8, "width": 256, "height": 128}
    assert added["defaults"] == expected
    assert added["defaults"] == _row(home, "fast")["defaults"]
    assert document("checkpoints", "add", "fast", turbo, "--licence", "MIT", "--home", home)["defaults"] == expected
    document("submit", _campaign(tmp_path, "fast"), "--home", home)
    assert expected.items() <= _request(home).items()
    assert "num_inference_steps=8" in sdpipeline("checkpoints", "list", "--home", home).stdout
    assert document("audit", "verify", "--home", home)["ok"] is True


def test_a_wrong_default_is_refused_before_anything_is_stored(home: Path, turbo: Path) -> None:
    refused = sdpipeline("checkpoints", "add", "fast", turbo, "--defaults", "steps=4", "--home", home)
    assert (refused.returncode, "did you mean 'num_inference_steps'?" in refused.stderr) == (2, True)
    assert "fast" not in {row["alias"] for row in document("checkpoints", "list", "--home", home)["checkpoints"]}


def test_plan_and_submit_warn_of_parameters_far_from_the_weights(tmp_path: Path, home: Path, turbo: Path) -> None:
    file = _campaign(tmp_path, "mine", ", num_inference_steps: 30, guidance_scale: 7")
    planned = document("plan", file, "--home", home)["warnings"]
    assert [each["key"] for each in planned] == ["stages[0].num_inference_steps", "stages[0].guidance_scale"]
    strict = sdpipeline("submit", file, "--strict", "--home", home)
    assert (strict.returncode, "30 is far from 4, for which 'mine' is made" in strict.stderr) == (2, True)
    submitted = document("submit", file, "--home", home)
    assert json.dumps(submitted["warnings"]) == json.dumps(planned)
