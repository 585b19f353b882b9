"""Reproduced pictures: from the file alone or from a job's id, with explained differences."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image

from sdpipeline import provenance
from sdpipeline.app import factories, services, workers
from sdpipeline.domain import Json
from sdpipeline.engine import Engine
from sdpipeline.errors import BadInputError, InputImageError
from sdpipeline.reporting import reproduce
from tests.integration.commands import document, pictures, sdpipeline

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def engine(demo_home: Path) -> Engine:
    return factories.build_engine(services.load_settings(demo_home), "cpu", None)


def _no_input(about: Json) -> bytes:
    raise InputImageError(f"no input {about}")


def _again(data: bytes, engine: Engine) -> reproduce.Reproduction:
    record = reproduce.checked_record(provenance.read_record(data), "a picture")
    pixels = provenance.decode(data, max_pixels=2**24)
    return reproduce.reproduce(record, engine, _no_input, original=pixels, pixels_sha256=None)


def _files(home: Path, stage: str) -> list[Path]:
    jobs = [job for job in pictures(home, "demo") if job["stage"] == stage]
    return [Path(job["image"]["url"].removeprefix("file://")) for job in jobs]


@pytest.mark.parametrize(
    ("stage", "count"), [("draft", 1), ("scene", 1), pytest.param("final", 1, marks=pytest.mark.long)]
)
def test_pictures_of_every_stage_are_made_again_bit_by_bit_from_the_file_alone(
    stage: str, count: int, demo_home: Path, engine: Engine
) -> None:
    for file in random.Random(stage).sample(_files(demo_home, stage), count):
        done = _again(file.read_bytes(), engine)
        assert done.bit_equal, done.document()
        assert done.differences == []


def test_a_changed_pixel_is_found(demo_home: Path, engine: Engine) -> None:
    data = _files(demo_home, "draft")[0].read_bytes()
    record = reproduce.checked_record(provenance.read_record(data), "a picture")
    pixels = provenance.decode(data, max_pixels=2**24).copy()
    pixels[3, 5] ^= 64
    done = reproduce.reproduce(record, engine, _no_input, original=pixels, pixels_sha256=None)
    assert (done.bit_equal, done.max_abs_diff) == (False, 64)


def test_another_library_then_is_named_as_the_difference(demo_home: Path, engine: Engine) -> None:
    data = _files(demo_home, "draft")[0].read_bytes()
    record = reproduce.checked_record(provenance.read_record(data), "a picture")
    record["ran"]["libraries"]["torch"] = "1.13.1"
    digest = provenance.pixels_sha256(provenance.decode(data, max_pixels=2**24))
    done = reproduce.reproduce(record, engine, _no_input, original=None, pixels_sha256=digest)
    assert done.bit_equal
    assert [(each["what"], each["then"]) for each in done.differences] == [("libraries.torch", "1.13.1")]


def test_a_picture_without_a_record_is_refused() -> None:
    with pytest.raises(BadInputError, match="has no record"):
        reproduce.checked_record(None, "holiday.png")


def test_the_command_reproduces_a_job_and_writes_the_picture(demo_home: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.png"
    assert document("reproduce", 1, "--home", demo_home, "--out", out) == {
        "bit_equal": True,
        "max_abs_diff": 0,
        "differences": [],
    }
    assert (provenance.read_record(out.read_bytes()) or {})["reproduction_of"]["identity"]


def test_weighted_prompts_of_a_batch_are_recorded_and_made_again(engine: Engine, tmp_path: Path) -> None:
    file, home = tmp_path / "weights.yaml", tmp_path / "home"
    file.write_text(
        "name: weights\ncheckpoint: shapes\nvariables: {weight: [0.5, 1.4]}\nprompt_syntax: weighted\n"
        "defaults: {width: 64, height: 64, num_inference_steps: 2}\nstages:\n"
        "  - {id: one, task: text-to-image, prompt: 'a (red:{{ weight }}) circle <lora:x:1>'}\n"
    )
    warned = document("submit", file, "--home", home)["warnings"]
    assert sum("'<lora:x:1>' is read as text" in each["message"] for each in warned) == 1
    workers.run_worker(services.load_settings(home), campaign="weights", until_idle=True, device="cpu")
    for job in pictures(home, "weights"):
        data = Path(job["image"]["url"].removeprefix("file://")).read_bytes()
        record = provenance.read_record(data) or {}
        assert record["asked"]["prompt_syntax"] == "weighted"
        assert record["ran"]["prompt_weights"]["prompt"] == [1.0, job["variables"]["weight"], 1.0]
        assert record["ran"]["bucket"] == 2
        assert _again(data, engine).bit_equal


def test_the_command_takes_outside_inputs_from_a_folder(tmp_path: Path) -> None:
    photograph = tmp_path / "astronaut.png"
    Image.fromarray(skimage.data.astronaut()).save(photograph)  # type: ignore[no-untyped-call]
    file = tmp_path / "photo.yaml"
    file.write_text(
        "name: photo\ncheckpoint: shapes\ndefaults: {width: 64, height: 64, num_inference_steps: 4}\nstages:\n"
        "  - {id: soft, task: image-to-image, prompt: a picture, image: {file: astronaut.png}, resize: crop,\n"
        "     strength: 0.5}\n"
    )
    home = tmp_path / "home"
    document("submit", file, "--home", home)
    workers.run_worker(services.load_settings(home), campaign="photo", until_idle=True, device="cpu")
    picture = shutil.copy(pictures(home, "photo")[0]["image"]["url"].removeprefix("file://"), tmp_path / "picture.png")
    elsewhere = ["--home", tmp_path / "elsewhere"]
    refused = sdpipeline("reproduce", picture, *elsewhere, "--json")
    assert refused.returncode == 1
    assert "is neither in storage nor in --inputs" in json.loads(refused.stdout)["errors"][0]["message"]
    found = tmp_path / "inputs"
    found.mkdir()
    shutil.copy(photograph, found)
    assert document("reproduce", picture, *elsewhere, "--inputs", found)["bit_equal"] is True
    assert np.asarray(Image.open(picture)).shape == (64, 64, 3)
