"""Guidance and ControlNet scales for each picture inside one forward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import Any

import diffusers.utils.torch_utils
import torch


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
        return _broadcast(self._values, tensor) * tensor

    __rmul__ = __mul__


@contextmanager
def controlnet_scales(controlnets: Sequence[torch.nn.Module], scales: Sequence[Sequence[float]]) -> Iterator[None]:
    """Multiply the output of each ControlNet by each picture's own scale; the pipelines get 1.0.

    A picture may use the same weights twice, so one module applies its scales in the order of the calls.
    """
    uses: dict[torch.nn.Module, list[torch.Tensor]] = defaultdict(list)
    for controlnet, scale in zip(controlnets, scales, strict=True):
        uses[controlnet].append(torch.tensor(scale, dtype=torch.float32))
    with ExitStack() as hooks:
        for controlnet, turns in uses.items():
            hooks.enter_context(_scaled_output(controlnet, turns))
        yield


@contextmanager
def _scaled_output(controlnet: torch.nn.Module, turns: list[torch.Tensor]) -> Iterator[None]:
    turn = cycle(turns)

    def scale(_module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        return _scaled(output, next(turn))

    handle = controlnet.register_forward_hook(scale)
    try:
        yield
    finally:
        handle.remove()


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


@contextmanager
def distilled_guidance(network: torch.nn.Module, guidance_scales: Sequence[float]) -> Iterator[None]:
    """Pass each picture's own guidance to a guidance-distilled network; its pipelines pass one for all pictures."""
    values = torch.tensor(guidance_scales, dtype=torch.float32)

    def replace(_module: torch.nn.Module, inputs: Any, keywords: dict[str, Any]) -> Any:
        given = keywords.get("guidance")
        if given is not None:
            keywords["guidance"] = values.to(device=given.device, dtype=given.dtype)
        return inputs, keywords

    handle = network.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _scaled(output: Any, scale: torch.Tensor) -> Any:
    """Multiply a ControlNet's residuals, in the containers of any class, by one scale per picture."""
    if isinstance(output, torch.Tensor):
        return output * _broadcast(scale, output)
    if isinstance(output, tuple | list):
        return type(output)([_scaled(part, scale) for part in output])
    return output


def _broadcast(scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shape one scale per picture for a tensor whose batch may hold each picture twice (guidance)."""
    repeats = like.shape[0] // scale.shape[0]
    shaped = scale.repeat(repeats).view(-1, *[1] * (like.ndim - 1))
    return shaped.to(device=like.device, dtype=like.dtype)
