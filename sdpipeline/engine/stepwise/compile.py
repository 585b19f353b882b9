"""Compilation, memory layout and attention backends for profiles that trade bits for speed.

All of it is applied for one pass and reverted afterwards, so that it never affects an exact picture. Quantization
cannot be reverted, so a quantized denoiser is a separate copy in :mod:`sdpipeline.engine.diffusers.model_cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdpipeline.domain import Json
from sdpipeline.engine.diffusers.pipeline_call import Weights
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


class Workshop:
    """Apply speedups to resident networks and revert them."""

    def __init__(self, speedups: Speedups) -> None:
        self._speedups = speedups
        self._compiled: WeakKeyDictionary[torch.nn.Module, Callable[..., Any]] = WeakKeyDictionary()
        self._channels_last: WeakSet[torch.nn.Module] = WeakSet()

    @contextmanager
    def applied(self, weights: Weights, *, wanted: bool) -> Iterator[None]:
        """Apply speedups for one pass if ``wanted``; the memory layout is set for the pass in either case."""
        networks = [weights.denoiser, weights.autoencoder, *(loaded.module for loaded in weights.controlnets)]
        for network in networks:
            self._lay_out(network, channels_last=wanted and self._speedups.channels_last)
        with ExitStack() as active:
            if wanted and self._speedups.compile:
                active.enter_context(self._compiled_blocks(weights.denoiser))
            if wanted and self._speedups.attention:
                active.enter_context(sdpa_kernel(BACKENDS[self._speedups.attention]))
            yield

    @contextmanager
    def _compiled_blocks(self, network: Any) -> Iterator[None]:
        """Compile the repeated blocks of a network, once for all of a kind and for every size of batch and picture.

        ``compile_repeated_blocks`` does the same but cannot be reverted. Families without a list of such blocks run
        uncompiled.
        """
        names = getattr(network, "_repeated_blocks", None) or ()
        blocks = [module for module in network.modules() if type(module).__name__ in names]
        for block in blocks:
            if block not in self._compiled:
                self._compiled[block] = torch.compile(block._call_impl, dynamic=True)  # noqa: SLF001
            block._compiled_call_impl = self._compiled[block]  # noqa: SLF001
        try:
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None  # noqa: SLF001

    def _lay_out(self, network: torch.nn.Module, *, channels_last: bool) -> None:
        if channels_last is (network in self._channels_last):
            return
        for parameter in network.parameters():
            if parameter.ndim == 4:
                form = torch.channels_last if channels_last else torch.contiguous_format
                parameter.data = parameter.data.to(memory_format=form)
        (self._channels_last.add if channels_last else self._channels_last.discard)(network)
