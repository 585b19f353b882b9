"""Stage 6: save the trained networks as three checkpoint directories in float16, with their manifest."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel

from sdpipeline.demo.manifest import NAMES, write_manifest
from sdpipeline.demo.networks import (
    UPSCALE_SCALING,
    build_upscale_text_encoder,
    low_resolution_schedule,
    noise_schedule,
    rescale_latents,
    upscale_noise_schedule,
)
from sdpipeline.demo.tokens import build_tokenizer
from sdpipeline.demo.train.loop import Run


def assemble(run: Run) -> Path:
    """Write `shapes`, `shapes-canny` and `shapes-upscale`; return their directory."""
    directory = run.directory / "checkpoints"
    for name in NAMES:
        shutil.rmtree(directory / name, ignore_errors=True)
    _shapes(run).save_pretrained(directory / "shapes")
    controlnet = ControlNetModel.from_pretrained(run.network_dir("controlnet"), dtype=torch.float16)
    controlnet.save_pretrained(directory / "shapes-canny")
    _upscale(run).save_pretrained(directory / "shapes-upscale")
    for config in directory.rglob("config.json"):
        _forget_origin(config)
    write_manifest(directory)
    return directory


def _forget_origin(config: Path) -> None:
    """Remove the path that diffusers stores: it names a directory of the training machine."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2) + "\n")


def _shapes(run: Run) -> DiffusionPipeline:
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(run.network_dir("autoencoder"), dtype=torch.float16),
        text_encoder=CLIPTextModel.from_pretrained(run.network_dir("text_encoder"), dtype=torch.float16),
        tokenizer=build_tokenizer(),
        unet=UNet2DConditionModel.from_pretrained(run.network_dir("unet"), dtype=torch.float16),
        scheduler=noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _upscale(run: Run) -> DiffusionPipeline:
    tokenizer = build_tokenizer()
    autoencoder = AutoencoderKL.from_pretrained(run.network_dir("upscale_autoencoder"))
    rescale_latents(autoencoder, UPSCALE_SCALING)
    return StableDiffusionUpscalePipeline(
        vae=autoencoder.half(),
        text_encoder=build_upscale_text_encoder(tokenizer).half(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(run.network_dir("upscale_unet"), dtype=torch.float16),
        low_res_scheduler=low_resolution_schedule(),
        scheduler=upscale_noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
    )
