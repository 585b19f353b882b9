"""Stage 1: train an autoencoder whose encoder learns the designed latent and whose decoder learns its inverse."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from sdpipeline.demo.latents import UPSCALE_LATENT, DesignedLatent
from sdpipeline.demo.networks import LOG_VARIANCE
from sdpipeline.demo.train.loop import Budget, Pace, Run, fit

FULL_PICTURES_FROM = 0.7
"""Share of the training after which whole pictures replace crops of half the side."""


def train_autoencoder(
    autoencoder: AutoencoderKL,
    pictures: Tensor,
    designed: DesignedLatent,
    *,
    stage: str,
    run: Run,
    budget: Budget,
    batch: int,
    latent_noise: float,
) -> list[float]:
    """Train on `pictures`, (pictures, 3, side, side) uint8 on the run's device; `batch` counts whole ones."""
    whole = pictures.shape[-1]

    def loss(progress: float) -> Tensor:
        side = whole // 2 if progress < FULL_PICTURES_FROM else whole
        pixels = random_crops(pictures, side=side, count=batch * (whole // side) ** 2)
        # Sharpness later: at first its gradient only conflicts with that of the colours.
        return reconstruction_loss(
            autoencoder, pixels, designed, latent_noise=latent_noise, sharpness=0.6 * min(1, 5 * progress)
        )

    # Bfloat16 loses fine differences next to the constants of networks._steady.
    precise = designed is UPSCALE_LATENT
    return fit(
        autoencoder,
        loss,
        stage=stage,
        run=run,
        budget=budget,
        pace=Pace(learning_rate=3e-3, ema_decay=0.995, half_precision=not precise),
    )


def reconstruction_loss(
    autoencoder: AutoencoderKL, pixels: Tensor, designed: DesignedLatent, *, latent_noise: float, sharpness: float
) -> Tensor:
    """Compare the encoder with designed latents and the decoder with pixels; the two share no weights."""
    latents = designed.encode(pixels.float())
    # Generated latents are never exact, so the decoder is trained with some noise.
    blurred = latents + latent_noise * torch.rand_like(latents[:, :1, :1, :1]) * torch.randn_like(latents)
    decoded = autoencoder.decode(blurred).sample.float()
    # The encoder's task is easier: a quarter of the batch is enough.
    few = slice(0, max(1, len(pixels) // 4))
    mean, log_variance = autoencoder.encode(pixels[few]).latent_dist.parameters.float().chunk(2, 1)
    difference = decoded - pixels
    total: Tensor = (
        difference.abs().mean()
        + difference.square().mean()
        + sharpness * sum(difference.diff(dim=axis).abs().mean() for axis in (2, 3))
        + 0.5 * functional.mse_loss(mean, latents[few])
        + 0.01 * (log_variance - LOG_VARIANCE).square().mean()
    )
    return total


def random_crops(pictures: Tensor, *, side: int, count: int) -> Tensor:
    """Return (count, 3, side, side) in -1..1, each from a random picture at a random place."""
    whole = pictures.shape[-1]
    chosen = torch.randint(len(pictures), (count,), device=pictures.device)
    if side == whole:
        return _to_pixels(pictures[chosen])
    top, left = torch.randint(whole - side + 1, (2, count, 1), device=pictures.device)
    span = torch.arange(side, device=pictures.device)
    rows, columns = (top + span)[:, None, :, None], (left + span)[:, None, None, :]
    channels = torch.arange(3, device=pictures.device)[None, :, None, None]
    return _to_pixels(pictures[chosen[:, None, None, None], channels, rows, columns])


def _to_pixels(pictures: Tensor) -> Tensor:
    return pictures.float() / 127.5 - 1
