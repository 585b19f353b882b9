"""Compilation, memory layout and attention backends for profiles that trade bits for speed.

All of it is suspended for exact pictures. Quantization
cannot be reverted, so a quantized denoiser is a separate copy in :mod:`sdpipeline.engine.diffusers.model_cache`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdpipeline.domain import Json
from sdpipeline.engine.diffusers.batch import Weights
from sdpipeline.engine.stepwise.quantization import Quantization
from sdpipeline.errors import Mistake, SettingsError

Attention = Literal["flash", "efficient", "cudnn", "math"]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedups:
    """Speedups that the deployment allows. ``decode_batch`` pictures are decoded at once, or all if it is ``None``."""

    compile: bool = False
    channels_last: bool = False
    attention: Attention | None = None
    quantize: Quantization | None = None
    decode_batch: int | None = None

    def document(self) -> Json:
        """Return the speedups that may change bits, for the record."""
        used = {
            "compile": self.compile,
            "channels_last": self.channels_last,
            "attention": self.attention,
            "quantize": self.quantize,
        }
        return {name: value for name, value in used.items() if value}


def check_compiler() -> None:
    """Raise SettingsError if this machine cannot compile: no C++ compiler or, on a GPU, no Triton."""
    try:
        torch.compile(lambda values: values + 1)(torch.zeros(2))
    except RuntimeError as error:
        fix = "install g++, or leave it out"
        message = f"torch cannot compile here: {str(error).splitlines()[0]}"
        raise SettingsError(Mistake(key="SDP_ENGINE__COMPILE", message=message, fix=fix)) from error


class AppliedSpeedups:
    """Apply speedups to resident networks for a pass, and suspend them for an exact one."""

    def __init__(self, speedups: Speedups) -> None:
        self._speedups = speedups
        self._compiled: WeakSet[torch.nn.Module] = WeakSet()
        self._channels_last: WeakSet[torch.nn.Module] = WeakSet()

    @contextmanager
    def applied(self, weights: Weights) -> Iterator[None]:
        """Apply the speedups inside the block; compiled code and memory layout stay until they are suspended."""
        self._lay_out(weights, channels_last=self._speedups.channels_last)
        if self._speedups.compile:
            self._compile(weights.denoiser)
        with ExitStack() as active:
            if self._speedups.attention:
                active.enter_context(sdpa_kernel(BACKENDS[self._speedups.attention]))
            yield

    @contextmanager
    def suspended(self, weights: Weights) -> Iterator[None]:
        """Run networks as they were loaded inside the block."""
        self._lay_out(weights, channels_last=False)
        with ExitStack() as active:
            if weights.denoiser in self._compiled:
                active.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def _compile(self, network: Any) -> None:
        """Compile the repeated blocks of a network, once for all of a kind and for every size of batch and picture."""
        if network in self._compiled:
            return
        with suppress(ValueError):  # families without a list of such blocks run uncompiled
            network.compile_repeated_blocks(dynamic=True)
            self._compiled.add(network)

    def _lay_out(self, weights: Weights, *, channels_last: bool) -> None:
        for network in (weights.denoiser, weights.autoencoder, *(loaded.module for loaded in weights.controlnets)):
            if channels_last is (network in self._channels_last):
                continue
            for parameter in network.parameters():
                if parameter.ndim == 4:
                    form = torch.channels_last if channels_last else torch.contiguous_format
                    parameter.data = parameter.data.to(memory_format=form)
            (self._channels_last.add if channels_last else self._channels_last.discard)(network)
