"""A job that cannot be made: other jobs succeed, the failure is reported with its reason, and a retry works."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdpipeline.app import queries, services
from tests.integration.commands import FAKE_ENGINE, document, pictures, sdpipeline

FAKE = {FAKE_ENGINE: "0"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A submitted campaign of two chains; the input of one of them is then damaged in storage."""
    for name, value in (("good", 200), ("bad", 100)):
        Image.fromarray(np.full((64, 64, 3), value, dtype=np.uint8)).save(tmp_path / f"{name}.png")
    file = tmp_path / "campaign.yaml"
    file.write_text(
        "name: two\ncheckpoint: shapes\nvariables: {photo: [good, bad]}\n"
        "defaults: {width: 64, height: 64, num_inference_steps: 2}\nstages:\n"
        "  - {id: first, task: image-to-image, prompt: x, image: {file: '{{ photo }}.png'}, strength: 0.5}\n"
        "  - {id: second, task: image-to-image, prompt: x, image: {stage: first}, strength: 0.5}\n"
    )
    home = tmp_path / "home"
    document("submit", file, "--home", home)
    damaged = _input_of(home, "bad")
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    return home


def _input_of(home: Path, photo: str) -> Path:
    job = next(job for job in pictures(home, "two") if job["variables"]["photo"] == photo and job["stage"] == "first")
    digest = str(document("show", job["id"], "--home", home)["request"]["image"]["digest"])
    return home / "storage" / "inputs" / digest


def _statuses(home: Path) -> dict[tuple[str, str], str]:
    return {(job["variables"]["photo"], job["stage"]): job["status"] for job in pictures(home, "two")}


def test_a_damaged_input_fails_its_own_job_skips_what_needs_it_and_leaves_exit_code_three(home: Path) -> None:
    document("worker", "--until-idle", "--home", home, exit_code=3, given=FAKE)
    assert _statuses(home) == {
        ("good", "first"): "succeeded",
        ("good", "second"): "succeeded",
        ("bad", "first"): "failed",
        ("bad", "second"): "skipped",
    }
    ran = sdpipeline("run", home.parent / "campaign.yaml", "--home", home, **FAKE)
    assert ran.returncode == 1  # storage holds other bytes under the input's digest and does not overwrite them
    assert "already holds different bytes" in ran.stderr
    with services.open_services(services.load_settings(home)) as have:
        failed, told = queries.failures(have, "two"), queries.finish_report(have, "two")
    assert [(each["stage"], each["attempts"], each["kind"]) for each in failed] == [("first", 1, "InputImage")]
    assert "was altered in storage" in failed[0]["error"]
    assert "was altered in storage" in told
    assert "signed by a development key, which nobody trusts" in told
    assert document("audit", "verify", "--home", home)["ok"] is True


@pytest.mark.long
def test_retry_makes_the_failed_job_and_what_was_skipped_because_of_it(home: Path) -> None:
    document("worker", "--until-idle", "--home", home, exit_code=3, given=FAKE)
    _input_of(home, "bad").write_bytes((home.parent / "bad.png").read_bytes())
    assert document("retry", "two", "--home", home)["retried"] == 1
    document("worker", "--until-idle", "--home", home, given=FAKE)
    assert set(_statuses(home).values()) == {"succeeded"}
    done = sdpipeline("run", home.parent / "campaign.yaml", "--home", home, **FAKE)
    assert (done.returncode, "4 unchanged" in done.stderr) == (0, True)


def test_a_home_whose_name_holds_spaces_and_signs_works(tmp_path: Path) -> None:
    home = tmp_path / "50% of my pictures? #1"
    file = tmp_path / "one.yaml"
    file.write_text(
        "name: one\ncheckpoint: shapes\ndefaults: {width: 64, height: 64}\n"
        "stages: [{id: only, task: text-to-image, prompt: x}]\n"
    )
    document("submit", file, "--home", home)
    assert document("worker", "--until-idle", "--home", home, given=FAKE)["succeeded"] == 1
    assert document("audit", "verify", "--home", home)["images"] == 1
    assert sorted(path.name for path in home.iterdir() if path.is_dir()) == ["keys", "storage"]


@pytest.mark.long
def test_a_value_pruned_put_back_and_pruned_again_is_made_once_and_leaves_the_audit_clean(
    tmp_path: Path,
) -> None:
    home, file = tmp_path / "home", tmp_path / "pair.yaml"
    text = (
        "name: pair\ncheckpoint: shapes\nvariables: {{colour: [{}]}}\ndefaults: {{width: 64, height: 64}}\n"
        "stages: [{{id: only, task: text-to-image, prompt: 'a {{{{ colour }}}} circle'}}]\n"
    )
    for colours in ("red, green", "red", "red, green", "red"):
        file.write_text(text.format(colours))
        document("submit", file, "--prune", "--home", home)
        document("worker", "--until-idle", "--home", home, given=FAKE)
    shown = document("show", 2, "--home", home)
    assert (shown["status"], len(shown["pictures"]), len(shown["history"])) == ("cancelled", 1, 1)
    assert document("audit", "verify", "--home", home)["faults"] == []
