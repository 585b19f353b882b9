"""Stage 5: train super-resolution by four, on clean pictures and on those decoded by the shapes autoencoder."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from sdpipeline.demo.latents import SHAPES_LATENT, UPSCALE_LATENT
from sdpipeline.demo.networks import UPSCALE_TEXT_WIDTH, low_resolution_schedule, upscale_noise_schedule
from sdpipeline.demo.train.autoencoder import FULL_PICTURES_FROM, random_crops
from sdpipeline.demo.train.loop import Budget, Pace, Run, fit
from sdpipeline.demo.train.text_to_latents import diffuse

MAX_NOISE_LEVEL = 350
"""Limit set by the pipeline."""


def train_upscale_unet(
    unet: UNet2DConditionModel,
    shapes_autoencoder: AutoencoderKL,
    pictures: Tensor,
    *,
    run: Run,
    budget: Budget,
    batch: int,
) -> list[float]:
    """Train on `pictures`, (pictures, 3, 512, 512) uint8 on the run's device; `batch` counts whole ones.

    An error is weighted by its effect on the pixels.
    """
    signal = upscale_noise_schedule().alphas_cumprod.to(run.device)
    low_signal = low_resolution_schedule().alphas_cumprod.to(run.device)
    shapes_autoencoder.to(run.device).eval().requires_grad_(False)
    visible = torch.tensor(UPSCALE_LATENT.std, device=run.device).square().view(1, -1, 1, 1)
    whole = pictures.shape[-1]

    def loss(progress: float) -> Tensor:
        side = whole // 2 if progress < FULL_PICTURES_FROM else whole
        pixels = random_crops(pictures, side=side, count=batch * (whole // side) ** 2)
        low, level = _noised_levels(degraded(pixels, shapes_autoencoder), low_signal)
        timesteps = torch.randint(1000, level.shape, device=run.device)
        latents = UPSCALE_LATENT.encode(pixels)
        noised, _ = diffuse(latents, signal[timesteps])
        words = noised.new_zeros(len(noised), 77, UPSCALE_TEXT_WIDTH)
        predicted = unet(torch.cat([noised, low], 1), timesteps, words, class_labels=level).sample
        error = (predicted.float() - latents).square() * visible
        return torch.mean(error)

    return fit(unet, loss, stage="upscale", run=run, budget=budget, pace=Pace(learning_rate=2e-3, half_precision=False))


@torch.no_grad()
def degraded(pixels: Tensor, shapes_autoencoder: AutoencoderKL) -> Tensor:
    """Reduce to a quarter of the side; decode half of the pictures also from noisy latents.

    A chain upscales generated pictures, which have wavy edges and blotchy flat areas.
    """
    small = functional.avg_pool2d(pixels, UPSCALE_LATENT.factor)
    latents = SHAPES_LATENT.encode(small)
    noise = 0.25 * torch.rand_like(latents[:, :1, :1, :1]) * torch.randn_like(latents)
    decoded = shapes_autoencoder.decode(latents + noise).sample.float().clamp(-1, 1)
    clean = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
    return torch.where(clean, small, decoded)


def _noised_levels(low: Tensor, low_signal: Tensor) -> tuple[Tensor, Tensor]:
    """Add noise as the pipeline does, half of the time near its default level of 20."""
    count = len(low)
    near = torch.randint(41, (count,), device=low.device)
    anywhere = torch.randint(MAX_NOISE_LEVEL + 1, (count,), device=low.device)
    level = torch.where(torch.rand(count, device=low.device) < 0.5, near, anywhere)
    return diffuse(low, low_signal[level])[0], level
