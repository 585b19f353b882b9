"""Training recipes: data, durations and batch sizes, for two CPU cores and for a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sdpipeline.demo.scenes import KINDS

STAGES = ("autoencoder", "words", "unet", "controlnet", "upscale", "assemble")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Data to draw, and seconds and batch sizes of each stage."""

    scenes: int
    pictures: int
    seconds: Mapping[str, float]
    batch: Mapping[str, int]
    """Whole pictures for the autoencoders and the upscaler, latents for the others."""
    unet_ema_decay: float
    kinds: Mapping[str, float] = field(default_factory=lambda: KINDS)
    """Share of each kind of scene."""


CPU_RECIPE = Recipe(
    scenes=30_000,
    pictures=800,
    seconds={
        "autoencoder": 270,
        "words": 30,
        "unet": 960,
        "controlnet": 200,
        "upscale_autoencoder": 60,
        "upscale": 110,
    },
    batch={
        "autoencoder": 4,
        "words": 32,
        "unet": 32,
        "controlnet": 32,
        "upscale_autoencoder": 2,
        "upscale": 2,
    },
    unet_ema_decay=0.998,
    # Single objects are learned first, and there is little time for more.
    kinds={"single": 0.85, "pair": 0.1, "counted": 0.05},
)
"""Thirty minutes on two free cores, drawing included."""

GPU_RECIPE = Recipe(
    scenes=500_000,
    pictures=6_000,
    seconds={
        "autoencoder": 60,
        "words": 8,
        "unet": 130,
        "controlnet": 40,
        "upscale_autoencoder": 115,
        "upscale": 115,
    },
    batch={
        "autoencoder": 128,
        "words": 1024,
        "unet": 1024,
        "controlnet": 1024,
        "upscale_autoencoder": 6,
        "upscale": 24,
    },
    unet_ema_decay=0.9995,
)
"""Eight minutes on one H100, and two more on sixteen cores for drawing."""
