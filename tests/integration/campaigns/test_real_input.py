"""Real input: an unmodified public prompt set, and a photograph."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image

from sdpipeline.app import services, workers
from sdpipeline.engine import Pixels
from sdpipeline.engine.quality import edge_recall, edges
from tests.integration.commands import document, pictures

PARTI_PROMPTS = Path(__file__).parents[2] / "data" / "PartiPrompts.tsv"
SHAPES = "checkpoint: shapes\ndefaults: {width: 128, height: 128, num_inference_steps: 10, guidance_scale: 4.0}\n"


def _astronaut() -> Pixels:
    pixels: Pixels = skimage.data.astronaut()  # type: ignore[no-untyped-call]
    return pixels


@pytest.mark.long
def test_the_parti_prompts_are_planned_and_submitted_whole_and_twenty_are_made(tmp_path: Path) -> None:
    shutil.copy(PARTI_PROMPTS, tmp_path)
    file = tmp_path / "parti.yaml"
    file.write_text(
        f"name: parti\n{SHAPES}variables: {{rows: {{file: PartiPrompts.tsv, columns: {{text: Prompt}}}}}}\n"
        "stages: [{id: picture, task: text-to-image, prompt: '{{ text }}'}]\n"
    )
    home = tmp_path / "home"
    assert document("plan", file, "--home", home)["jobs"]["new"] == 1632
    assert document("submit", file, "--home", home)["added"] == 1632
    stop, made = threading.Event(), list[int]()

    def stop_after_twenty(count: int) -> None:
        made.append(count)
        if len(made) >= 20:
            stop.set()

    workers.run_worker(
        services.load_settings(home),
        campaign="parti",
        until_idle=True,
        device="cpu",
        stop=stop,
        on_progress=stop_after_twenty,
    )
    succeeded = [job for job in pictures(home, "parti") if job["status"] == "succeeded"]
    assert len(succeeded) >= 20
    assert all(Path(job["image"]["url"].removeprefix("file://")).is_file() for job in succeeded)
    assert document("audit", "verify", "--home", home)["ok"] is True


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    """A public-domain portrait, 512 x 512 (NASA, shipped with scikit-image)."""
    file = tmp_path / "astronaut.png"
    Image.fromarray(_astronaut()).save(file)
    return file


@pytest.mark.long
def test_a_photograph_steers_a_controlnet_and_an_image_to_image_stage(tmp_path: Path, photograph: Path) -> None:
    file = tmp_path / "photo.yaml"
    file.write_text(
        f"name: photo\n{SHAPES}stages:\n"
        "  - {id: freely, task: text-to-image, prompt: a red heart on a white background}\n"
        "  - {id: outline, task: text-to-image, prompt: a red heart on a white background, resize: stretch,\n"
        "     controlnets: [{checkpoint: shapes-canny, image: {file: astronaut.png}, annotator: canny,\n"
        "        annotator_parameters: {low_threshold: 60, high_threshold: 140}}]}\n"
        "  - {id: softly, task: image-to-image, prompt: a picture, image: {file: astronaut.png}, resize: stretch,\n"
        "     strength: 0.2}\n"
        "  - {id: strongly, task: image-to-image, prompt: a picture, image: {file: astronaut.png}, resize: stretch,\n"
        "     strength: 0.9}\n"
    )
    home = tmp_path / "home"
    document("submit", file, "--home", home)
    photograph.unlink()  # workers read the copy in storage
    workers.run_worker(services.load_settings(home), campaign="photo", until_idle=True, device="cpu")
    made = {job["stage"]: job for job in pictures(home, "photo")}
    assert {job["status"] for job in made.values()} == {"succeeded"}
    shown = {stage: np.asarray(Image.open(job["image"]["url"].removeprefix("file://"))) for stage, job in made.items()}
    original = np.asarray(Image.fromarray(_astronaut()).resize((128, 128), Image.Resampling.LANCZOS))
    asked = edges(original)
    kept = {stage: edge_recall(edges(shown[stage]), asked) for stage in ("freely", "outline")}
    assert kept["outline"] > 2 * kept["freely"]
    distance = {stage: np.abs(picture.astype(int) - original).mean() for stage, picture in shown.items()}
    assert distance["softly"] < distance["strongly"]
