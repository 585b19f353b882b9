"""The main job as a user runs it: one command, real processes, a real Prefect server, the shipped weights."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from sdpipeline.demo import measure
from sdpipeline.engine.quality import edge_recall, edges
from tests.conftest import copied_into
from tests.integration.commands import FAKE_ENGINE, document, installed, kill_tree, pictures, start

JOBS, PER_STAGE = 24, 8

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def tampered(demo_home: Path, tmp_path: Path) -> Path:
    """A copy of that home for manual changes. The picture URLs still point to the original home."""
    return Path(shutil.copytree(demo_home, tmp_path / "home"))


def _path(url: str) -> Path:
    return Path(unquote(urlsplit(url).path))


def _pixels(job: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(Image.open(_path(job["image"]["url"])).convert("RGB"))


def _change(home: Path, statement: str) -> None:
    with sqlite3.connect(home / "sdpipeline.db") as connection:
        assert connection.execute(statement).rowcount == 1


def _kinds(home: Path) -> set[str]:
    found = document("audit", "verify", "--home", home, exit_code=3)
    return {fault["kind"] for fault in found["faults"]}


def test_every_job_of_the_demo_has_one_picture_with_the_recorded_digest(demo_home: Path) -> None:
    jobs = pictures(demo_home, "demo")
    assert [job["status"] for job in jobs] == ["succeeded"] * JOBS
    paths = [_path(job["image"]["url"]) for job in jobs]
    assert len(set(paths)) == JOBS
    for job, path in zip(jobs, paths, strict=True):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == job["image"]["sha256"]
    stored = [
        path for path in (demo_home / "storage" / "default" / "demo").rglob("*.png") if ".control-" not in path.name
    ]
    assert sorted(stored) == sorted(paths)


def _open_to_others(home: Path) -> list[str]:
    found = [home, *home.rglob("*")]
    return [str(path) for path in found if not path.is_symlink() and path.stat().st_mode & 0o077]


def test_everything_that_a_demo_writes_is_its_owners_alone(demo_home: Path) -> None:
    assert {"sdpipeline.db", "storage", "logs", "keys", "prefect"} <= {path.name for path in demo_home.iterdir()}
    assert _open_to_others(demo_home) == []


def test_doctor_closes_a_home_that_others_may_read_and_says_so(tampered: Path) -> None:
    for path in (tampered, tampered / "storage"):
        path.chmod(0o755)
    (tampered / "sdpipeline.db").chmod(0o644)
    lines = [document("doctor", "--home", tampered)["checks"][0] for _ in range(2)]
    assert [(line["name"], line["ok"]) for line in lines] == [("home", True)] * 2
    assert lines[0]["detail"].startswith("fixed: 3 of ")
    assert "accessible to their owner only" in lines[1]["detail"]
    assert _open_to_others(tampered) == []


def test_the_pictures_show_what_was_asked_for(demo_home: Path) -> None:
    right: dict[str, list[bool]] = {"ground": [], "scene": [], "object": [], "final": []}
    kept: list[float] = []
    jobs = pictures(demo_home, "demo")
    drafts = {job["id"]: job for job in jobs if job["stage"] == "draft"}
    for job in jobs:
        shown, values = _pixels(job), job["variables"]
        if job["stage"] == "draft":
            right["ground"].append(measure.background(shown) == values["ground"])
        if job["stage"] == "scene":
            right["scene"].append(measure.background(shown) == values["scene"])
            right["object"].append([seen.colour for seen in measure.sightings(shown)][:1] == [values["colour"]])
            asked = edges(_pixels(drafts[job["parents"][0]]))
            kept.append(edge_recall(edges(shown), asked))
        if job["stage"] == "final":
            assert shown.shape == (512, 512, 3)
            right["final"].append(measure.background(shown) == values["scene"])
    assert {name: sum(found) >= 7 for name, found in right.items()} == dict.fromkeys(right, True), right
    assert np.mean(kept) > 0.6, kept  # without the ControlNet it is about 0.2


def test_a_second_demo_adds_nothing_and_says_so(demo_home: Path) -> None:
    done = installed("demo", "--home", demo_home)
    assert done.returncode == 0, done.stderr
    assert "Nothing to do: all 24 pictures exist already." in done.stdout
    assert "0 jobs added, 24 unchanged" in done.stderr


def test_the_audit_of_an_untouched_home_finds_no_fault(demo_home: Path) -> None:
    found = document("audit", "verify", "--home", demo_home)
    assert found["ok"] is True
    assert found["images"] == JOBS
    assert found["seals"] >= 1


def test_one_changed_byte_of_a_picture_is_found(tampered: Path) -> None:
    picture = next((tampered / "storage" / "default" / "demo" / "final").rglob("*.png"))
    data = bytearray(picture.read_bytes())
    data[len(data) // 2] ^= 1
    picture.chmod(0o644)
    picture.write_bytes(bytes(data))
    assert _kinds(tampered) == {"object-altered"}


def test_one_changed_audit_row_is_found(tampered: Path) -> None:
    _change(
        tampered,
        "UPDATE audit_event SET body = replace(body, 'job.succeeded', 'job.failed') "
        "WHERE rowid = (SELECT min(rowid) FROM audit_event WHERE body LIKE '%job.succeeded%')",
    )
    assert "event-altered" in _kinds(tampered)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE job SET request = json_set(request, '$.prompt', 'something else') WHERE id = 3",
        "UPDATE job SET status = 'failed' WHERE id = 3",
        "UPDATE job SET seed = seed + 1 WHERE id = 3",
        "UPDATE job SET attempt = 7 WHERE id = 3",
    ],
)
def test_one_changed_job_row_is_found_and_named(tampered: Path, change: str) -> None:
    _change(tampered, change)
    found = document("audit", "verify", "--home", tampered, exit_code=3)
    assert ("job-altered", "job:3") in {(fault["kind"], fault["subject"]) for fault in found["faults"]}


def test_show_tells_everything_about_one_job(demo_home: Path) -> None:
    shown = document("show", "24", "--home", demo_home)
    assert shown["campaign"] == "demo"
    assert shown["request"]["num_inference_steps"] == 4
    assert [event["event"] for event in shown["events"]] == ["job.succeeded"]
    assert shown["history"][0]["outcome"] == "succeeded"


@pytest.mark.long
def test_a_run_whose_whole_process_tree_is_killed_is_finished_by_the_next(
    tmp_path: Path, long_campaign: Path, prefect_database: Path
) -> None:
    home = tmp_path / "home"
    copied_into(home / "prefect", prefect_database)
    settings = {FAKE_ENGINE: "0.4", "SDP_LEASE_TTL_S": "3"}
    first = start("run", long_campaign, "--home", home, **settings)
    _wait_for_pictures(home, 8)
    assert kill_tree(first) >= 3
    done = installed("run", long_campaign, "--home", home, **settings)
    assert done.returncode == 0, done.stderr
    jobs = pictures(home, "long")
    assert {job["status"] for job in jobs} == {"succeeded"}
    assert len({job["image"]["url"] for job in jobs}) == len(jobs) == 48
    assert document("audit", "verify", "--home", home)["ok"] is True


@pytest.fixture
def long_campaign(tmp_path: Path) -> Path:
    """A campaign of three stages and sixteen seeds."""
    file = tmp_path / "long.yaml"
    file.write_text(
        "name: long\ncheckpoint: shapes\nseeds: {count: 16}\n"
        "defaults: {width: 64, height: 64, num_inference_steps: 2}\n"
        "stages:\n"
        "  - {id: draft, task: text-to-image, prompt: a red circle}\n"
        "  - {id: scene, task: image-to-image, prompt: a red circle, image: {stage: draft}, strength: 0.5}\n"
        "  - {id: final, task: image-to-image, prompt: a red circle, image: {stage: scene}, strength: 0.5}\n"
    )
    return file


def _wait_for_pictures(home: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (home / "sdpipeline.db").is_file():
            with sqlite3.connect(f"file:{home / 'sdpipeline.db'}?mode=ro", uri=True) as connection:
                made = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'image'").fetchone()[0]
                if made and connection.execute("SELECT count(*) FROM image").fetchone()[0] >= count:
                    return
        time.sleep(0.1)
    raise AssertionError(f"no {count} pictures within two minutes")
