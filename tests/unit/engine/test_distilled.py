"""Detection of distilled checkpoints by their configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdpipeline.engine.distilled import PRESETS, detected_defaults, embeds_guidance, fitting, shown
from sdpipeline.engine.families import FAMILIES

LCM = {"_class_name": "LCMScheduler", "timestep_scaling": 10.0}
TCD = {"_class_name": "TCDScheduler"}
TURBO = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
SD_TURBO = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "prediction_type": "epsilon"}
BASE = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
ZERO_SNR = SD_TURBO | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
DDIM = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}


def folder(tmp_path: Path, **parts: Any) -> Path:
    """A checkpoint folder with these configurations, by part."""
    for name, config in ({"unet": {}} | parts).items():
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(config if isinstance(config, str) else json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("family", "parts", "expected"),
    [
        ("sd1", {"scheduler": LCM}, "num_inference_steps=4 guidance_scale=1 scheduler=lcm"),
        (
            "sdxl",
            {"scheduler": LCM, "unet": {"time_cond_proj_dim": 256}},
            "num_inference_steps=4 guidance_scale=8 scheduler=lcm",
        ),
        (
            "sdxl",
            {"scheduler": BASE, "unet": {"time_cond_proj_dim": 256}},
            "num_inference_steps=4 guidance_scale=8 scheduler=lcm",
        ),
        ("sdxl", {"scheduler": TURBO}, "num_inference_steps=4 guidance_scale=0 scheduler=euler-trailing"),
        ("sd2", {"scheduler": SD_TURBO}, "num_inference_steps=4 guidance_scale=0 scheduler=euler-trailing"),
        (
            "sdxl",
            {"scheduler": TCD},
            "num_inference_steps=4 guidance_scale=0 scheduler=tcd",
        ),
        ("flux", {"transformer": {"guidance_embeds": False}}, "num_inference_steps=4 guidance_scale=0"),
        ("flux", {"transformer": {"guidance_embeds": True}}, ""),
        ("sdxl", {"scheduler": BASE}, ""),
        ("sdxl", {"scheduler": ZERO_SNR}, ""),
        ("sd2", {"scheduler": DDIM}, ""),
        ("latent-upscale", {"scheduler": BASE, "unet": {"time_cond_proj_dim": 896}}, ""),
        ("sd1", {}, ""),
        ("sd1", {"scheduler": "not json", "unet": "[1]"}, ""),
    ],
)
def test_a_distilled_checkpoint_shows_in_its_configurations(
    tmp_path: Path, family: str, parts: dict[str, Any], expected: str
) -> None:
    assert shown(detected_defaults(folder(tmp_path, **parts), "checkpoint", family)) == expected


def test_the_name_of_a_folder_and_other_kinds_of_weights_show_nothing(tmp_path: Path) -> None:
    turbo = tmp_path / "sdxl-turbo-lightning-4step"
    turbo.mkdir()
    assert not detected_defaults(folder(turbo, scheduler=BASE), "checkpoint", "sdxl")
    assert not detected_defaults(tmp_path, "lora", "sdxl")
    assert not detected_defaults(tmp_path, "controlnet", "sd3-inpaint")


def test_only_a_unet_that_takes_guidance_as_an_embedding_is_one(tmp_path: Path) -> None:
    directory = folder(tmp_path, unet={"time_cond_proj_dim": 256})
    assert embeds_guidance(directory, FAMILIES["sd1"])
    assert not embeds_guidance(directory, FAMILIES["latent-upscale"])
    assert not embeds_guidance(tmp_path / "elsewhere", FAMILIES["sd1"])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_a_family_with_its_schedulers_or_without(name: str) -> None:
    assert fitting(PRESETS[name], FAMILIES["sdxl"]) == PRESETS[name]
    assert set(fitting(PRESETS[name], FAMILIES["sd3"])) == {"num_inference_steps", "guidance_scale"}
