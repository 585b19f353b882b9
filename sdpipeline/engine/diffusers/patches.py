"""Everything in which this engine relies on the inside of diffusers, with the reason and the end of each.

Nothing else replaces an attribute of a library's object or reads a private one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import diffusers
import diffusers.utils.torch_utils
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from sdpipeline.errors import Mistake, SettingsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One reliance: what is patched, why, what makes it needless, and if the library still has the expected shape."""

    target: str
    why: str
    until: str
    intact: Callable[[], bool] = field(repr=False)


def check(patches: Sequence[Patch] | None = None) -> None:
    """Raise SettingsError if the installed diffusers has another inside than these patches expect."""
    for patch in PATCHES if patches is None else patches:
        if not patch.intact():
            message = f"diffusers {version('diffusers')} has changed {patch.target}, which pictures rely on"
            raise SettingsError(Mistake(message=message, fix="pip install 'diffusers>=0.42,<0.43'"))


class PerImageScale:
    """One number per picture that pipelines use as a float: it compares as a switch and multiplies as a tensor.

    The stock pipelines do ``if guidance_scale > 1`` and ``guidance_scale * (text - unconditional)``.
    """

    def __init__(self, values: Sequence[float]) -> None:
        self._values = torch.tensor(values, dtype=torch.float32)

    def __gt__(self, other: float) -> bool:
        """Return True if any picture is guided; a batch never mixes guided and unguided ones."""
        return bool((self._values > other).any())

    def __mul__(self, tensor: torch.Tensor) -> torch.Tensor:
        return broadcast(self._values, tensor) * tensor

    __rmul__ = __mul__


@contextmanager
def float32_noise() -> Iterator[None]:
    """Draw noise in float32 and round it, so that a seed gives the same picture in half precision as in full.

    Some releases of torch (2.11, not 2.13) draw other numbers for other dtypes from the same seed. All of
    diffusers' noise comes from one module, in which ``torch`` is replaced; a torch function mode would
    slow down every call.
    """
    torch_utils: Any = diffusers.utils.torch_utils
    torch_utils.torch = _TorchWithFloat32Noise()
    try:
        yield
    finally:
        torch_utils.torch = torch


class _TorchWithFloat32Noise:
    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def randn(self, *size: Any, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
        drawn = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        noise = torch.randn(*size, dtype=drawn, **options)
        return noise if dtype is None else noise.to(dtype)


@contextmanager
def no_global_randomness(vae: Any) -> Iterator[None]:
    """Use the mode of the latents' distribution if a pipeline passes no generator.

    Otherwise it would sample from torch's global generator, as SD3's ControlNet does.
    """
    encode = vae.encode

    def encode_without_chance(*inputs: Any, **keywords: Any) -> Any:
        output = encode(*inputs, **keywords)
        distribution = output.latent_dist
        sample = distribution.sample
        distribution.sample = lambda generator=None: sample(generator) if generator else distribution.mode()
        return output

    vae.encode = encode_without_chance
    try:
        yield
    finally:
        del vae.encode


def broadcast(scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shape one scale per picture for a tensor whose batch may hold each picture twice (guidance)."""
    repeats = like.shape[0] // scale.shape[0]
    shaped = scale.repeat(repeats).view(-1, *[1] * (like.ndim - 1))
    return shaped.to(device=like.device, dtype=like.dtype)


def _draws_noise_through_torch() -> bool:
    torch_utils: Any = diffusers.utils.torch_utils
    names = torch_utils.randn_tensor.__code__.co_names
    return torch_utils.torch is torch and {"torch", "randn"} <= set(names)


def _samples_latents_by_method() -> bool:
    encode = inspect.signature(diffusers.AutoencoderKL.encode).parameters
    sample = inspect.signature(DiagonalGaussianDistribution.sample).parameters
    return "x" in encode and "generator" in sample and hasattr(DiagonalGaussianDistribution, "mode")


def _compares_guidance_as_a_number() -> bool:
    guided: Any = diffusers.StableDiffusionPipeline.do_classifier_free_guidance
    unet = SimpleNamespace(config=SimpleNamespace(time_cond_proj_dim=None))
    return [
        guided.fget(SimpleNamespace(_guidance_scale=PerImageScale([scale]), unet=unet)) for scale in (1.0, 4.0)
    ] == [False, True]


PATCHES = (
    Patch(
        target="diffusers.utils.torch_utils.torch",
        why="torch 2.11 draws other noise for half precision than for float32 from the same seed",
        until="the lower bound of torch is 2.13, which draws the same",
        intact=_draws_noise_through_torch,
    ),
    Patch(
        target="AutoencoderKL.encode and DiagonalGaussianDistribution.sample",
        why="the ControlNet pipelines of SD3 sample latents from torch's global generator",
        until="diffusers passes the call's generator there (0.42 does not)",
        intact=_samples_latents_by_method,
    ),
    Patch(
        target="do_classifier_free_guidance and the product of guidance_scale with a tensor",
        why="pipelines take one guidance scale for the whole batch",
        until="the families run on modular pipelines, whose guiders may be replaced",
        intact=_compares_guidance_as_a_number,
    ),
)
