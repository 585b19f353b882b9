"""Reproduced pictures run on the scheduler of their record, whatever its name means on the checkpoint now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from sdpipeline.domain import Json
from sdpipeline.engine import GeneratedImage, PreparedRequest
from sdpipeline.engine.diffusers import pipeline_call, schedulers
from sdpipeline.engine.families import SCHEDULERS
from tests.integration.engine.published_configs import (
    COSXL,
    LEAKY_DPM,
    PLAYGROUND,
    PLAYGROUND_VAE,
    SDXL_BASE,
    Variant,
    registered,
    twin,
)
from tests.integration.engine_requests import equal, failure_of, images, new_engine, prepared, request, results

Older = Callable[..., GeneratedImage]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recorded")


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> Older:
    """Make a picture as releases did that took every option of the checkpoint's configuration."""

    def create(name: str, row: Any, own: Json, *, alias: str) -> Any:
        scheduler_class = getattr(diffusers, SCHEDULERS[name][0])
        overrides = {"dpmpp-2m": {"algorithm_type": "dpmsolver++", "solver_order": 2}}.get(name, {})
        config = dict(own) | overrides | dict(row.scheduler_config)
        known = scheduler_class.__init__.__wrapped__.__code__.co_varnames
        return scheduler_class.from_config({key: value for key, value in config.items() if key in known})

    def made(given: PreparedRequest) -> GeneratedImage:
        with monkeypatch.context() as patch:
            patch.setattr(schedulers, "create", create)
            return images(given, on=new_engine())[0]

    return made


def _given(
    name: str, root: Path, config: Json, *, scheduler: str, base: str = "sd1", **changes: Any
) -> PreparedRequest:
    files = changes.pop("files", {})
    variant = Variant(base=base, config=config, scheduler=scheduler, files=files)
    return prepared(request(registered(name, twin(name, variant, root)), scheduler=scheduler, **changes))


@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_an_older_picture_with_leaked_options_is_bit_equal(profile: Any, root: Path, older: Older) -> None:
    given = _given(f"leaky-{profile}", root, LEAKY_DPM, scheduler="dpmpp-2m", num_inference_steps=5, profile=profile)
    before = older(given)
    assert before.ran["scheduler"]["config"]["use_karras_sigmas"] is True
    again = images(replace(given, recorded=before.ran, calls=before.ran.get("calls", ())))[0]
    assert equal(again, before)
    assert again.ran["scheduler"] == before.ran["scheduler"]
    now = images(given)[0]
    assert now.ran["scheduler"]["config"]["use_karras_sigmas"] is False
    assert not equal(now, before)


def test_an_older_picture_of_a_combination_that_is_refused_now_is_bit_equal(root: Path, older: Older) -> None:
    given = _given("heun-on-edm", root, COSXL, base="sdxl", scheduler="heun")
    assert "no EDM preconditioning" in failure_of(results(given)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdpipeline.engine.families.scheduler_config.refusal", lambda *_args, **_options: None)
        before = older(given)
    assert equal(images(replace(given, recorded=before.ran))[0], before)


def test_a_picture_that_was_decoded_without_latent_statistics_is_so_again(root: Path) -> None:
    files = {"vae/config.json": PLAYGROUND_VAE}
    given = _given("playground", root, PLAYGROUND, base="sdxl", scheduler="euler", files=files)
    now = images(given)[0]
    assert now.ran["latent_statistics"] == {
        "mean": PLAYGROUND_VAE["latents_mean"],
        "std": PLAYGROUND_VAE["latents_std"],
    }
    assert equal(images(replace(given, recorded=now.ran))[0], now)
    older_record = {key: value for key, value in now.ran.items() if key != "latent_statistics"}
    again = images(replace(given, recorded=older_record))[0]
    assert not equal(again, now)
    assert "latent_statistics" not in again.ran


@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_a_picture_is_made_again_with_its_recorded_eta(profile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = prepared(request("sd1", scheduler="tcd", num_inference_steps=3, profile=profile))
    monkeypatch.setattr(pipeline_call, "ETA", {"tcd": 0.9})
    older = images(given)[0]
    assert older.ran["scheduler"]["eta"] == 0.9
    monkeypatch.undo()
    again = images(replace(given, recorded=older.ran, calls=older.ran.get("calls", ())))[0]
    assert equal(again, older)
    assert again.ran["scheduler"]["eta"] == 0.9
    assert not equal(images(given)[0], older)


def test_infinities_of_a_record_are_numbers_again(root: Path) -> None:
    given = _given("infinite", root, SDXL_BASE, scheduler="dpmpp-2m")
    made = images(given)[0]
    assert made.ran["scheduler"]["config"]["lambda_min_clipped"] == "-inf"
    found = schedulers.recorded_scheduler(made.ran)
    assert found is not None
    assert schedulers.recreate(found).config.lambda_min_clipped == -np.inf


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"class": "DiffusionPipeline", "config": {}}, "'DiffusionPipeline', which is not used here"),
        ({"class": ["DDIMScheduler"], "config": {}}, "which is not used here"),
        ({"class": "DDIMScheduler", "config": [1]}, "'DDIMScheduler', which is not used here"),
        ({"class": "DDIMScheduler", "config": {"path": "/etc"}}, "'path', which DDIMScheduler does not take"),
        ({"class": "DDIMScheduler", "config": {"num_train_timesteps": 10**12}}, "'num_train_timesteps'"),
        ({"class": "DDIMScheduler", "config": {"trained_betas": [[1]]}}, "'trained_betas'"),
        ({"class": "TCDScheduler", "config": {}, "eta": 7}, "an eta of 7, which is not from 0 to 1"),
        ({"class": "TCDScheduler", "config": {}, "eta": "nan"}, "an eta of nan"),
        ({"class": "DDIMScheduler", "config": {"beta_start": "much"}}, "does not accept the record's configuration"),
        ({"class": "DDIMScheduler", "config": {"beta_schedule": "none"}}, "does not accept the record's configuration"),
    ],
)
def test_a_forged_record_is_refused_in_words(scheduler: Json, message: str) -> None:
    given = prepared(request("sd1"))
    refused = failure_of(results(replace(given, recorded={"scheduler": scheduler}))[0])
    assert refused.startswith("RequestRefusedError: scheduler: ")
    assert message in refused
