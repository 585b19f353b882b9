"""Eight-bit quantization of denoisers' large linear layers through torchao, for profiles that trade bits for speed."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal

import torch

from sdpipeline.errors import Mistake, RequestRefusedError, SettingsError

Quantization = Literal["int8", "fp8"]
LIBRARY = "torchao"
SETTING = "SDP_ENGINE__QUANTIZE"
FP8_CAPABILITY = (8, 9)
"""Lowest CUDA compute capability with fp8 multiplication: Ada, Hopper and later."""
FP8_DTYPE = "bfloat16"
"""Input and output dtype of the fp8 kernels with a scale for each row."""
SIDE = 16
"""Both sides of a weight have to be multiples of this for the fp8 kernels (int8 kernels take multiples of 8)."""
PER_PICTURE = ("emb", "norm")
"""Parts of the names of layers with one row per picture (time steps, modulations) or with the first features. They are
not quantized: they cost little, kernels need more rows, and their rounding errors spread over the whole picture."""


def check(wanted: Quantization, device: str, dtype: str | None) -> None:
    """Raise SettingsError if torchao is not installed, or the device or the deployment's dtype does not support it."""
    if find_spec(LIBRARY) is None:
        message = f"{wanted} needs {LIBRARY}, which is not installed"
        raise SettingsError(Mistake(key=SETTING, message=message, fix="pip install 'sdpipeline[quantize]'"))
    if wanted == "fp8" and (lack := _lacks_fp8(torch.device(device))):
        message = f"fp8 needs a GPU of compute capability {_dotted(FP8_CAPABILITY)} or more, and {lack}"
        raise SettingsError(Mistake(key=SETTING, message=message, fix="set it to int8, or leave it out"))
    if wanted == "fp8" and dtype != FP8_DTYPE:
        message = f"fp8 needs {FP8_DTYPE}"
        raise SettingsError(Mistake(key=SETTING, message=message, fix=f"set SDP_ENGINE__DTYPE={FP8_DTYPE}"))


def library_of(quantized: Quantization | None) -> dict[str, str]:
    """Return the quantization library with its version, for the record; empty without quantization."""
    return {LIBRARY: version(LIBRARY)} if quantized else {}


def quantize(network: torch.nn.Module, wanted: Quantization) -> None:
    """Replace the weights of a network's large linear layers by eight-bit ones, irreversibly.

    Activations are scaled row by row while the network runs, so that no row depends on others in the batch.
    """
    from torchao.quantization import quantize_

    weight = next(network.parameters())
    if wanted == "fp8" and weight.dtype != getattr(torch, FP8_DTYPE):
        raise RequestRefusedError(f"profile: fp8 needs {FP8_DTYPE}, but the weights are {weight.dtype}")
    quantize_(network, _configuration(wanted, weight.device), filter_fn=_is_large)


def _configuration(wanted: Quantization, device: torch.device) -> Any:
    """Return the configuration without torchao's own compiler settings, which would change the whole process."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
    )
    from torchao.utils import should_reduce_range

    if wanted == "fp8":
        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    return Int8DynamicActivationInt8WeightConfig(
        granularity=PerRow(),
        set_inductor_config=False,
        reduce_range=should_reduce_range(device),  # sums silently overflow on CPUs without VNNI
    )


def _is_large(module: torch.nn.Module, name: str) -> bool:
    if not isinstance(module, torch.nn.Linear) or any(part in name for part in PER_PICTURE):
        return False
    return module.in_features % SIDE == 0 and module.out_features % SIDE == 0


def _lacks_fp8(device: torch.device) -> str | None:
    """Return the reason why this device cannot multiply in fp8, or ``None``."""
    if device.type != "cuda":
        return f"this worker's device is {device}"
    has = torch.cuda.get_device_capability(device)
    return None if has >= FP8_CAPABILITY else f"{torch.cuda.get_device_name(device)} has {_dotted(has)}"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
