"""Pictures of variants that public checkpoints publish, compared with the stock pipeline's own call."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdpipeline.domain import Task
from sdpipeline.engine import PreparedRequest
from sdpipeline.engine.families import FAMILIES
from sdpipeline.engine.pixels import paste_back, to_pil, to_pixels
from tests.integration.engine.published_configs import (
    COSXL,
    FLUX_DEV,
    FLUX_SCHNELL,
    KARRAS,
    LATENT_UPSCALER,
    LCM,
    LEAKY_DPM,
    LIGHTNING,
    NOOBAI_V,
    PLAYGROUND,
    PLAYGROUND_VAE,
    SD3,
    SD15,
    SD21,
    SDXL_BASE,
    SDXL_TURBO,
    UPSCALER,
    ZERO_SNR,
    Variant,
    registered,
    twin,
)
from tests.integration.engine_requests import SOURCE, images, middle_mask, noise, prepared, request
from tests.integration.tiny_checkpoints import tiny_checkpoints

PLAIN = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
DPM = "DPMSolverMultistepScheduler"
DPMPP_2M = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True}
EULER = "EulerDiscreteScheduler"
TRAINED = {"trained_betas": np.linspace(0.001, 0.02, 1000).tolist()}
ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 1.0}

VARIANTS = {
    "sd15-ddim": Variant(base="sd1", config=SD15, scheduler="ddim", stock=("DDIMScheduler", {})),
    "sd15-dpmpp-2m": Variant(base="sd1", config=SD15, scheduler="dpmpp-2m", stock=(DPM, {})),
    "leaky-dpmpp-2m": Variant(base="sd1", config=LEAKY_DPM, scheduler="dpmpp-2m", stock=(DPM, DPMPP_2M | PLAIN)),
    "leaky-euler": Variant(base="sd1", config=LEAKY_DPM, scheduler="euler", stock=(EULER, PLAIN)),
    "leaky-unipc": Variant(
        base="sd1",
        config=LEAKY_DPM,
        scheduler="unipc",
        stock=("UniPCMultistepScheduler", PLAIN | {"solver_order": 2, "solver_type": "bh2", "lower_order_final": True}),
    ),
    "karras-euler": Variant(base="sd1", config=KARRAS, scheduler="euler", stock=(EULER, PLAIN)),
    "karras-euler-karras": Variant(base="sd1", config=KARRAS, scheduler="euler-karras"),
    "karras-heun": Variant(base="sd1", config=KARRAS, scheduler="heun", stock=("HeunDiscreteScheduler", PLAIN)),
    "exponential-euler": Variant(
        base="sd1", config=SDXL_BASE | {"use_exponential_sigmas": True}, scheduler="euler", stock=(EULER, PLAIN)
    ),
    "lcm": Variant(base="sd1", config=LCM, scheduler="lcm"),
    "lcm-dreamshaper-ddim": Variant(base="sd1", config=LCM, scheduler="ddim", stock=("DDIMScheduler", {})),
    "sd15-ddpm": Variant(
        base="sd1",
        config=SD15 | {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"},
        scheduler="ddpm",
        stock=("DDPMScheduler", {"variance_type": "fixed_small"}),
    ),
    "zero-snr-ddim": Variant(base="sd1", config=ZERO_SNR, scheduler="ddim"),
    "zero-snr-euler": Variant(base="sd1", config=ZERO_SNR, scheduler="euler", stock=(EULER, {})),
    "zero-snr-dpmpp-2m-karras": Variant(
        base="sd1", config=ZERO_SNR, scheduler="dpmpp-2m-karras", stock=(DPM, {"use_karras_sigmas": True})
    ),
    "trained-betas": Variant(base="sd1", config=SD15 | TRAINED, scheduler="euler", stock=(EULER, {})),
    "cosine": Variant(
        base="sd1", config=SD21 | {"beta_schedule": "squaredcos_cap_v2"}, scheduler="dpmpp-2m", stock=(DPM, {})
    ),
    "continuous": Variant(
        base="sd1",
        config=KARRAS
        | {"timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0, "prediction_type": "v_prediction"},
        scheduler="euler-karras",
    ),
    "openclip-activation": Variant(
        base="sd1",
        config=SD15,
        scheduler="ddim",
        stock=("DDIMScheduler", {}),
        files={"text_encoder/config.json": {"hidden_act": "gelu", "eos_token_id": 2}},
    ),
    "ema-vae": Variant(
        base="sd1",
        config=SD21,
        scheduler="ddim",
        files={"vae/config.json": {"scaling_factor": 0.5, "force_upcast": False, "sample_size": 768}},
    ),
    "centred-input": Variant(
        base="sd1", config=SD21, scheduler="ddim", files={"unet/config.json": {"center_input_sample": True}}
    ),
    "sd21": Variant(base="sd2", config=SD21, scheduler="ddim"),
    "sd-turbo": Variant(base="sd2", config=LIGHTNING, scheduler="euler", request=ONE_STEP),
    "sd-inpainting": Variant(base="sd-inpaint", config=SD15, scheduler="ddim", stock=("DDIMScheduler", {})),
    "sdxl-base": Variant(base="sdxl", config=SDXL_BASE, scheduler="euler"),
    "sdxl-dpmpp-2m-sde": Variant(
        base="sdxl", config=SDXL_BASE, scheduler="dpmpp-2m-sde", stock=(DPM, {"algorithm_type": "sde-dpmsolver++"})
    ),
    "sdxl-turbo": Variant(base="sdxl", config=SDXL_TURBO, scheduler="euler-ancestral", request=ONE_STEP),
    "lightning": Variant(
        base="sdxl", config=LIGHTNING, scheduler="euler", request={"num_inference_steps": 4, "guidance_scale": 1.0}
    ),
    "noobai-v": Variant(base="sdxl", config=NOOBAI_V, scheduler="euler"),
    "playground": Variant(
        base="sdxl", config=PLAYGROUND, scheduler="dpmpp-2m", files={"vae/config.json": PLAYGROUND_VAE}
    ),
    "playground-euler": Variant(
        base="sdxl",
        config=PLAYGROUND,
        scheduler="euler",
        stock=("EDMEulerScheduler", {}),
        files={"vae/config.json": PLAYGROUND_VAE},
    ),
    "playground-image-to-image": Variant(
        base="sdxl",
        config=PLAYGROUND,
        scheduler="dpmpp-2m",
        files={"vae/config.json": PLAYGROUND_VAE},
        request={"task": Task.IMAGE_TO_IMAGE, "strength": 0.7},
    ),
    "cosxl": Variant(base="sdxl", config=COSXL, scheduler="euler"),
    "empty-is-not-zero": Variant(
        base="sdxl",
        config=SDXL_BASE,
        scheduler="euler",
        files={"model_index.json": {"force_zeros_for_empty_prompt": False}},
    ),
    "sdxl-image-to-image": Variant(
        base="sdxl", config=SDXL_BASE, scheduler="euler", request={"task": Task.IMAGE_TO_IMAGE, "strength": 0.7}
    ),
    "aesthetic-image-to-image": Variant(
        base="sdxl",
        config=SDXL_BASE,
        scheduler="euler",
        files={"model_index.json": {"requires_aesthetics_score": True}},
        parts={"unet": {"projection_class_embeddings_input_dim": 72}},
        request={"task": Task.IMAGE_TO_IMAGE, "strength": 0.7},
    ),
    "no-quant-conv": Variant(
        base="sdxl",
        config=SDXL_BASE,
        scheduler="euler",
        parts={"vae": {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}},
    ),
    "wide-text": Variant(
        base="sd1",
        config=SD21,
        scheduler="ddim",
        parts={"unet": {"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj", "cross_attention_dim": 48}},
    ),
    "sdxl-inpainting": Variant(base="sdxl-inpaint", config=SDXL_BASE, scheduler="euler"),
    "sd3": Variant(base="sd3", config=SD3, scheduler="flow-match-euler"),
    "sd3-shift-1": Variant(base="sd3", config=SD3 | {"shift": 1.0}, scheduler="flow-match-euler"),
    "sd3-dynamic": Variant(base="sd3", config=FLUX_DEV, scheduler="flow-match-euler"),
    "sd3-karras": Variant(base="sd3", config=SD3 | {"use_karras_sigmas": True}, scheduler="flow-match-euler"),
    "sd3-exponential": Variant(base="sd3", config=SD3 | {"use_exponential_sigmas": True}, scheduler="flow-match-euler"),
    "sd3-inverted": Variant(base="sd3", config=SD3 | {"invert_sigmas": True}, scheduler="flow-match-euler"),
    "sd3-terminal": Variant(base="sd3", config=SD3 | {"shift_terminal": 0.1}, scheduler="flow-match-euler"),
    "sd3-image-to-image": Variant(
        base="sd3",
        config=FLUX_DEV,
        scheduler="flow-match-euler",
        request={"task": Task.IMAGE_TO_IMAGE, "strength": 0.7},
    ),
    "flux-dev": Variant(base="flux", config=FLUX_DEV, scheduler="flow-match-euler"),
    "flux-linear-shift": Variant(
        base="flux", config=FLUX_DEV | {"time_shift_type": "linear", "max_shift": 2.0}, scheduler="flow-match-euler"
    ),
    "sd35": Variant(
        base="sd3",
        config=SD3,
        scheduler="flow-match-euler",
        parts={"transformer": {"qk_norm": "rms_norm", "dual_attention_layers": [0]}},
    ),
    "flux-schnell": Variant(
        base="flux",
        config=FLUX_SCHNELL,
        scheduler="flow-match-euler",
        parts={"transformer": {"guidance_embeds": False}},
        request={"num_inference_steps": 4, "guidance_scale": 1.0},
    ),
    "flux-fixed-shift": Variant(base="flux", config=FLUX_SCHNELL, scheduler="flow-match-euler"),
    "upscaler": Variant(base="upscale", config=UPSCALER, scheduler="ddim"),
    "upscaler-euler": Variant(base="upscale", config=UPSCALER, scheduler="euler", stock=(EULER, {})),
    "latent-upscaler": Variant(base="latent-upscale", config=LATENT_UPSCALER, scheduler="euler"),
}
"""Each is bit-equal to the stock pipeline, as 8 bits per channel."""

LONG = VARIANTS.keys() - {
    "leaky-dpmpp-2m",
    "leaky-euler",
    "karras-euler-karras",
    "lcm",
    "zero-snr-ddim",
    "zero-snr-euler",
    "sd21",
    "sd-inpainting",
    "sdxl-base",
    "sdxl-turbo",
    "noobai-v",
    "playground",
    "aesthetic-image-to-image",
    "sdxl-inpainting",
    "sd3-dynamic",
    "sd35",
    "flux-dev",
    "flux-schnell",
    "upscaler",
    "latent-upscaler",
}
"""Variants that only the long tests run."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


# Pipelines of Stable Diffusion 1.x correct such a configuration themselves, as we do.
@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in VARIANTS])
def test_a_picture_is_the_stock_pipelines(name: str, root: Path) -> None:
    variant = VARIANTS[name]
    directory = twin(name, variant, root)
    given = _asked(registered(name, directory), variant)
    ours = images(given)[0].pixels
    stock = to_pixels(_stock(variant, directory, given))
    if "mask_image" in given.images:  # ours keeps the unmasked pixels, as the record says
        stock = paste_back(stock, given.images["image"], given.images["mask_image"])
    apart = np.abs(ours.astype(int) - stock.astype(int))
    assert apart.max() == 0


def _asked(alias: str, variant: Variant) -> PreparedRequest:
    changes = dict(variant.request)
    task = changes.pop("task", next(iter(FAMILIES[tiny_checkpoints().files(alias).family].plain)))
    pictures: dict[str, Any] = {}
    if task is not Task.TEXT_TO_IMAGE:
        changes["image"] = SOURCE
    if task is Task.INPAINTING:
        changes["mask_image"] = SOURCE
    one = request(alias, task=task, scheduler=variant.scheduler, **changes)
    if one.image:
        pictures["image"] = noise(3, one.width)
    if one.mask_image:
        pictures["mask_image"] = middle_mask(one.width)
    return prepared(one, **pictures)


def _stock(variant: Variant, directory: Path, given: PreparedRequest) -> Any:
    """The picture of the pipeline's own call, 0-1."""
    one = given.request
    cell = FAMILIES[tiny_checkpoints().files(one.checkpoint.alias).family].cell(one.task)
    assert cell is not None
    pipe = _pipeline(str(directory) if variant.files or variant.parts else variant.base, cell.pipeline)
    own: Any = getattr(diffusers, variant.config["_class_name"])
    scheduler = own.from_pretrained(directory / "scheduler")
    if variant.stock:
        scheduler = getattr(diffusers, variant.stock[0]).from_config(scheduler.config, **variant.stock[1])
    pipe = type(pipe)(**pipe.components | {"scheduler": scheduler}, **_options(pipe))
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {role: to_pil(pixels) for role, pixels in given.images.items()}
    if cell.takes_size:
        arguments |= {"width": one.width, "height": one.height}
    if cell.strength is not None:
        arguments["strength"] = cell.strength if one.strength is None else one.strength
    return pipe(
        one.prompt,
        num_inference_steps=one.num_inference_steps,
        guidance_scale=one.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(one.seed),
        output_type="np",
        **arguments,
    ).images[0]


@cache
def _pipeline(directory: str, class_name: str) -> Any:
    path = Path(directory) if directory.startswith("/") else tiny_checkpoints().directory(directory)
    return getattr(diffusers, class_name).from_pretrained(path)


def _options(pipe: Any) -> dict[str, Any]:
    names = ("requires_safety_checker", "force_zeros_for_empty_prompt", "requires_aesthetics_score", "max_noise_level")
    return {name: pipe.config[name] for name in names if name in pipe.config}
