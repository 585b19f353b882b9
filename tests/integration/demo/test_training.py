"""The training recipe: every stage learns within a few steps, and resumes after an interruption."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the engine's extra is not installed")

from sdpipeline.demo.manifest import NAMES, measure_manifest, read_manifest  # noqa: E402
from sdpipeline.demo.scenes import render, sample_scene  # noqa: E402
from sdpipeline.demo.train.loop import Run  # noqa: E402
from sdpipeline.demo.train.recipe import CPU_RECIPE, STAGES  # noqa: E402
from sdpipeline.demo.train.training import Training  # noqa: E402

pytestmark = pytest.mark.long

STEPS = 40

TINY = replace(
    CPU_RECIPE,
    scenes=64,
    batch={
        "autoencoder": 2,
        "words": 16,
        "unet": 4,
        "controlnet": 16,  # with fewer, their variance exceeds what forty steps learn
        "upscale_autoencoder": 1,
        "upscale": 1,
    },
)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Forty steps per stage. Pictures have a quarter of the real side length, which every stage accepts."""
    directory = tmp_path_factory.mktemp("training")
    rng = np.random.default_rng(0)
    np.save(directory / "pictures.npy", np.stack([render(rng, sample_scene(rng), side=128) for _ in range(16)]))
    run = Run(directory=directory, device=torch.device("cpu"))
    return Training(run=run, recipe=TINY, steps=STEPS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one OpenMP thread: two wait for each other whenever the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def losses(training: Training) -> Callable[[str], list[float]]:
    """A stage's losses; the stages it builds on are trained first, each once."""

    @cache
    def train(stage: str) -> list[float]:
        for earlier in STAGES[: STAGES.index(stage)]:
            train(earlier)
        return training.train(stage)

    return train


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "assemble"])
def test_the_loss_falls_in_every_stage(losses: Callable[[str], list[float]], stage: str) -> None:
    assert losses(stage)[-1] < losses(stage)[0], losses(stage)


def test_the_stages_leave_three_checkpoints_and_their_manifest(
    training: Training, losses: Callable[[str], list[float]]
) -> None:
    losses("assemble")
    directory = training.run.directory / "checkpoints"
    assert tuple(read_manifest(directory)) == NAMES
    assert read_manifest(directory) == measure_manifest(directory)


def test_a_checkpoint_names_no_directory_of_the_machine_it_was_trained_on(
    training: Training, losses: Callable[[str], list[float]]
) -> None:
    losses("assemble")
    configs = list((training.run.directory / "checkpoints").rglob("*.json"))
    assert configs
    assert not [path for path in configs if str(training.run.directory) in path.read_text()]


def test_an_interrupted_stage_goes_on_where_it_stopped(
    training: Training, losses: Callable[[str], list[float]]
) -> None:
    before = losses("words")
    resumed = replace(training, run=replace(training.run, resume=True), steps=STEPS + 20)
    assert resumed.train("words")[:-1] == before


def test_the_same_seed_trains_the_same(
    training: Training, losses: Callable[[str], list[float]], tmp_path: Path
) -> None:
    before = losses("words")
    (tmp_path / "corpus.npz").symlink_to(training.run.directory / "corpus.npz")
    again = replace(training, run=replace(training.run, directory=tmp_path))
    assert again.train("words") == pytest.approx(before, rel=1e-3)
