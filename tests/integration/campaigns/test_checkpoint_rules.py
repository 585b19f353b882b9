# ruff: noqa: E501 -- a mistake is one line, regardless of its length

"""Plans are refused where a checkpoint's own configuration files do not allow a value, naming field and fix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdpipeline.campaigns import expand
from sdpipeline.engine import config_checks
from sdpipeline.errors import CampaignError, CheckpointError
from tests.factories import CATALOG, campaign_of, checkpoint_files, input_folder

SD15: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
FLOW: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
EDM: dict[str, Any] = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}
SCHEDULER = "scheduler/scheduler_config.json"
CONTROLNET = "[{checkpoint: canny, annotator: canny, image: {stage: first}}]"

Files = Mapping[str, Mapping[str, Any]]


def _mistakes(root: Path, family: str, files: Files, stage: str, extra: str = "") -> list[str]:
    """Mistakes of a stage on a checkpoint that has these configuration files and no weights."""
    for name, document in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(document), encoding="utf-8")
    catalog = CATALOG | {
        "odd": replace(checkpoint_files("odd", family=family), directory=root),
        "canny": replace(checkpoint_files("canny", kind="controlnet", family=family), directory=root / "canny"),
        "plain-vae": replace(checkpoint_files("plain-vae", kind="vae", family=family), directory=root / "other"),
    }
    text = f"""
defaults: {{width: 64, height: 64}}
{extra}
stages:
  - {{id: first, task: text-to-image, prompt: a circle}}
  - {{id: odd, checkpoint: odd, prompt: a circle, {"" if "task:" in stage else "task: text-to-image, "}{stage}}}
"""
    try:
        expand.check(campaign_of(text, catalog=catalog), input_folder(Path("/nowhere")))
    except CampaignError as error:
        return [str(mistake).partition("stages[1].")[2] or str(mistake) for mistake in error.mistakes]
    return []


REFUSED: dict[str, tuple[Mapping[str, Any], str, str]] = {
    "cosine-karras": (
        SD15 | {"beta_schedule": "squaredcos_cap_v2"},
        "scheduler: dpmpp-2m-karras",
        (
            "scheduler: 'dpmpp-2m-karras' cannot use beta_schedule squaredcos_cap_v2, as scheduler/scheduler_config.json "
            "says (use dpmpp-2m)"
        ),
    ),
    "cosine-ancestral": (
        SD15 | {"beta_schedule": "squaredcos_cap_v2"},
        "scheduler: euler-ancestral",
        "scheduler: 'euler-ancestral' cannot use beta_schedule squaredcos_cap_v2 with timestep_spacing linspace",
    ),
    "lcm-steps": (SD15, "scheduler: lcm, num_inference_steps: 51", "num_inference_steps: 51 is more than 50, the most"),
    "lcm-own-steps": (
        SD15 | {"original_inference_steps": 8},
        "scheduler: lcm, num_inference_steps: 9",
        "num_inference_steps: 9 is more than 8, the most that 'lcm' takes with this checkpoint (write at most 8)",
    ),
    "ddim-steps": (
        SD15 | {"num_train_timesteps": 100},
        "scheduler: ddim, num_inference_steps: 101",
        "num_inference_steps: 101 is more than 99",
    ),
    "zero-snr-heun": (
        SD15 | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        "scheduler: heun",
        "scheduler: 'heun' cannot do rescale_betas_zero_snr, as scheduler/scheduler_config.json says (use one of ddim,",
    ),
    "zero-snr-epsilon": (
        SD15 | {"rescale_betas_zero_snr": True},
        "scheduler: lcm",
        "scheduler: 'lcm' divides by zero with rescale_betas_zero_snr and prediction_type epsilon",
    ),
    "sample": (
        SD15 | {"prediction_type": "sample"},
        "scheduler: euler-ancestral",
        "scheduler: 'euler-ancestral' cannot do prediction_type sample",
    ),
    "flow-prediction": (
        SD15 | {"prediction_type": "flow_prediction"},
        "scheduler: unipc",
        (
            "checkpoint: scheduler/scheduler_config.json says flow_prediction, but the pipelines of Stable Diffusion 1.x "
            "do not run flow matching"
        ),
    ),
    "flow-class": (FLOW, "scheduler: euler", "checkpoint: scheduler/scheduler_config.json says FlowMatchEulerDiscrete"),
    "flow-sigmas": (
        SD15 | {"use_flow_sigmas": True},
        "scheduler: dpmpp-2m",
        "checkpoint: scheduler/scheduler_config.json says use_flow_sigmas: true",
    ),
    "sigmoid": (
        SD15 | {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"},
        "scheduler: euler",
        "scheduler: 'euler' cannot do beta_schedule sigmoid, as scheduler/scheduler_config.json says (use one of ddpm)",
    ),
    "learned-variance": (
        SD15 | {"_class_name": "DDPMScheduler", "variance_type": "learned_range"},
        "scheduler: ddpm",
        "checkpoint: scheduler/scheduler_config.json has variance_type: learned_range",
    ),
    "other-noise": (
        {"_class_name": "IPNDMScheduler"},
        "scheduler: euler",
        "checkpoint: scheduler/scheduler_config.jso",
    ),
    "edm": (
        EDM,
        "scheduler: heun",
        "scheduler: 'heun' has no EDM preconditioning, but scheduler/scheduler_config.json ",
    ),
    "edm-sample": (
        EDM | {"prediction_type": "sample"},
        "scheduler: euler",
        "scheduler: 'euler' cannot do prediction_ty",
    ),
    "thresholding": (SD15 | {"thresholding": True}, "scheduler: euler", "scheduler: 'euler' cannot do thresholding"),
    "continuous": (
        SD15 | {"timestep_type": "continuous"},
        "scheduler: dpmpp-2m",
        (
            "scheduler: 'dpmpp-2m' cannot do timestep_type continuous, as scheduler/scheduler_config.json says (use one of "
            "euler, euler-karras"
        ),
    ),
    "spacing": (
        SD15 | {"timestep_spacing": "even"},
        "scheduler: euler",
        "checkpoint: scheduler/scheduler_config.json has timestep_spacing: 'even', which is not one of leading,",
    ),
    "no-number": (
        SD15 | {"beta_end": "0.012"},
        "scheduler: euler",
        "checkpoint: scheduler/scheduler_config.json has beta_end: '0.012', which is not a number",
    ),
    "no-whole-number": (
        SD15 | {"steps_offset": None},
        "scheduler: euler",
        "checkpoint: scheduler/scheduler_config.jso",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_scheduler_that_cannot_do_what_the_checkpoint_says_is_refused(name: str, tmp_path: Path) -> None:
    config, stage, expected = REFUSED[name]
    (found,) = _mistakes(tmp_path, "sd1", {SCHEDULER: config}, stage)
    assert found.startswith(expected)


@pytest.mark.parametrize("value", ["{{ sampler }}", "dpmpp-2m-karras"])
def test_a_scheduler_from_a_template_is_refused_as_a_written_one(value: str, tmp_path: Path) -> None:
    files = {SCHEDULER: SD15 | {"beta_schedule": "squaredcos_cap_v2"}}
    variables = "variables: {sampler: [euler, dpmpp-2m-karras]}" if "{" in value else ""
    (found,) = _mistakes(tmp_path, "sd1", files, f'scheduler: "{value}"', variables)
    assert found.startswith("scheduler: 'dpmpp-2m-karras' cannot use beta_schedule squaredcos_cap_v2")


def test_steps_from_a_template_are_refused(tmp_path: Path) -> None:
    stage = 'scheduler: lcm, num_inference_steps: "{{ count }}"'
    (found,) = _mistakes(tmp_path, "sd1", {SCHEDULER: SD15}, stage, "variables: {count: [4, 60]}")
    assert found.startswith("num_inference_steps: 60 is more than 50")


def test_model_index_names_the_class_of_the_scheduler(tmp_path: Path) -> None:
    files = {SCHEDULER: SD15, "model_index.json": {"scheduler": ["diffusers", "EDMEulerScheduler"]}}
    (found,) = _mistakes(tmp_path, "sdxl", files, "scheduler: unipc")
    assert found.startswith("scheduler: 'unipc' has no EDM preconditioning")


@pytest.mark.parametrize(
    ("family", "config", "stage", "expected"),
    [
        ("sd3", SD15, "", "checkpoint: scheduler/scheduler_config.json names PNDMScheduler, but Stable Diffusion 3 needs"),
        ("flux", FLOW | {"stochastic_sampling": True}, "", "checkpoint: scheduler/scheduler_config.json has stochastic_sa"),
        ("flux", FLOW | {"time_shift_type": "cubic"}, "", "checkpoint: scheduler/scheduler_config.json has time_shift_type"),
        ("flux", FLOW | {"use_karras_sigmas": True, "use_beta_sigmas": True}, "", "checkpoint: scheduler/scheduler_config."),
        ("flux", FLOW | {"shift_terminal": 0.1}, "num_inference_steps: 1", "num_inference_steps: 1 is too few"),
        ("sd3", FLOW | {"use_dynamic_shifting": True}, f"controlnets: {CONTROLNET}", "controlnets: scheduler/scheduler_con"),
    ],
)  # fmt: skip
def test_flow_matching_that_cannot_run_is_refused(
    family: str, config: Mapping[str, Any], stage: str, expected: str, tmp_path: Path
) -> None:
    (found,) = _mistakes(tmp_path, family, {SCHEDULER: config}, stage or "num_inference_steps: 4")
    assert found.startswith(expected)


SDXL_UNET: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "cross_attention_dim": 2048,
}
PARTS: dict[str, tuple[str, Files, str]] = {
    "class": (
        "sd1",
        {"unet/config.json": {"class_embed_type": "timestep"}},
        "unet/config.json has class_embed_type: tim",
    ),
    "classes": ("sd1", {"unet/config.json": {"num_class_embeds": 10}}, "unet/config.json has num_class_embeds: 10"),
    "image": (
        "sd1",
        {"unet/config.json": {"addition_embed_type": "image"}},
        "unet/config.json has addition_embed_type: ",
    ),
    "hidden": (
        "sd1",
        {"unet/config.json": {"encoder_hid_dim_type": "image_proj"}},
        "unet/config.json has encoder_hid_dim_type: image_proj",
    ),
    "channels": (
        "sd1",
        {"unet/config.json": {"out_channels": 4}, "vae/config.json": {"latent_channels": 16}},
        "unet/config.json has out_channels: 4, but the autoencoder has 16",
    ),
    "width": (
        "sd1",
        {"unet/config.json": {"cross_attention_dim": 1024}, "text_encoder/config.json": {"hidden_size": 768}},
        "unet/config.json reads text of width 1024, but the text encoders give 768",
    ),
    "sizes": (
        "sdxl",
        {
            "unet/config.json": SDXL_UNET | {"projection_class_embeddings_input_dim": 2560},
            "text_encoder_2/config.json": {"projection_dim": 1280},
        },
        "unet/config.json has projection_class_embeddings_input_dim: 2560, but needs 2816",
    ),
    "long-clip": (
        "sd1",
        {"text_encoder/config.json": {"model_type": "clip_text_model", "max_position_embeddings": 248}},
        "text_encoder/config.json has max_position_embeddings: 248",
    ),
    "mask": (
        "sd1",
        {"text_encoder/config.json": {"use_attention_mask": True}},
        "text_encoder/config.json has use_attention_mask: True",
    ),
    "shift": ("sd1", {"vae/config.json": {"shift_factor": 0.1}}, "vae/config.json has shift_factor: 0.1"),
    "no-shift": ("flux", {"vae/config.json": {"latent_channels": 16}}, "vae/config.json has no shift_factor"),
    "mean": (
        "sd1",
        {"vae/config.json": {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}},
        "vae/config.json has latents_mean: […], but Stable Diffusion 1.x does not normalise latents",
    ),
    "half": (
        "sdxl",
        {"vae/config.json": {"latents_std": [1.0] * 4}},
        "vae/config.json has latents_std without the other",
    ),
    "short": (
        "sdxl",
        {"vae/config.json": {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}},
        "vae/config.json has latents_mean for another number of channels",
    ),
    "grey": ("sd1", {"vae/config.json": {"out_channels": 1}}, "vae/config.json has out_channels: 1"),
    "pooled": (
        "flux",
        {"transformer/config.json": {"pooled_projection_dim": 768}, "text_encoder/config.json": {"hidden_size": 1280}},
        "transformer/config.json has pooled_projection_dim: 768, but the text encoders give 1280",
    ),
    "packed": (
        "flux",
        {
            "transformer/config.json": {"in_channels": 64},
            "vae/config.json": {"latent_channels": 4, "shift_factor": 0.1},
        },
        "transformer/config.json has in_channels: 64, but the autoencoder's latents give 16",
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_says_what_no_pipeline_does_is_refused_by_plan_and_when_it_is_added(
    name: str, tmp_path: Path
) -> None:
    family, files, expected = PARTS[name]
    (found,) = _mistakes(tmp_path, family, files, "num_inference_steps: 4")
    assert found.startswith(f"checkpoint: {expected}")
    with pytest.raises(CheckpointError) as refused:
        config_checks.check("odd", tmp_path, family)
    assert expected in str(refused.value)


@pytest.mark.parametrize("profile", ["fast", "turbo"])
def test_a_controlnet_that_pools_its_output_needs_the_exact_profile(profile: str, tmp_path: Path) -> None:
    files = {"canny/config.json": {"global_pool_conditions": True}}
    (found,) = _mistakes(tmp_path, "sd1", files, f"profile: {profile}, controlnets: {CONTROLNET}")
    assert found.startswith(f"profile: '{profile}' cannot batch the calls of a ControlNet")
    assert _mistakes(tmp_path, "sd1", files, f"profile: exact, controlnets: {CONTROLNET}") == []


def test_latent_statistics_are_refused_for_inpainting_alone(tmp_path: Path) -> None:
    statistics = {"latent_channels": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    assert _mistakes(tmp_path, "sdxl", {"vae/config.json": statistics}, "num_inference_steps: 4") == []
    stage = "task: inpainting, image: {stage: first}, mask_image: {stage: first}, num_inference_steps: 4"
    (found,) = _mistakes(tmp_path, "sdxl", {}, stage)
    assert found.startswith("checkpoint: vae/config.json has latents_mean: […], but inpainting of Stable Diffusion XL")


def test_another_autoencoder_needs_the_same_latent_statistics(tmp_path: Path) -> None:
    files = {"vae/config.json": {"scaling_factor": 0.5}, "other/config.json": {"scaling_factor": 0.5}}
    assert _mistakes(tmp_path, "sdxl", files, "vae: plain-vae") == []
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    (found,) = _mistakes(
        tmp_path, "sdxl", {"other/config.json": {"scaling_factor": 0.5} | statistics}, "vae: plain-vae"
    )
    assert found.startswith("vae: 'plain-vae' is for sdxl, whose latents differ")


def test_scored_sizes_are_for_edits_alone(tmp_path: Path) -> None:
    files: dict[str, dict[str, Any]] = {
        "unet/config.json": SDXL_UNET | {"projection_class_embeddings_input_dim": 2560},
        "text_encoder_2/config.json": {"projection_dim": 1280},
        "model_index.json": {"requires_aesthetics_score": True},
    }
    (found,) = _mistakes(tmp_path, "sdxl", files, "num_inference_steps: 4")
    assert "for text-to-image with requires_aesthetics_score: true" in found
    stage = "task: image-to-image, image: {stage: first}"
    assert _mistakes(tmp_path, "sdxl", {}, stage) == []


def test_a_size_beyond_the_transformers_positions_is_refused(tmp_path: Path) -> None:
    files = {"transformer/config.json": {"pos_embed_max_size": 96, "patch_size": 2}}
    (found,) = _mistakes(tmp_path, "sd3", files, "width: 2048")
    assert found.startswith("width: 2048 is more than 1536")


def test_a_checkpoint_whose_files_are_elsewhere_is_not_refused(tmp_path: Path) -> None:
    assert _mistakes(tmp_path, "sd1", {}, "scheduler: lcm, num_inference_steps: 4") == []
