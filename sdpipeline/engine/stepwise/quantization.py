"""Denoisers whose large matrix products run in eight bits, for profiles that trade bits for speed, through torchao."""

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
"""CUDA's compute capability from which on a GPU multiplies in fp8: Ada, Hopper and what came after."""
FP8_DTYPE = "bfloat16"
"""What fp8's kernels with a scale for each row take and give."""
SIDE = 16
"""What both sides of a weight have to be a multiple of for fp8's kernels (int8's take multiples of 8)."""
PER_PICTURE = ("emb", "norm")
"""In the names of layers that see one row for each picture (time steps, modulations) or make the first features: they
cost next to nothing, kernels want more rows, and what they round off spreads over the whole picture."""


def check(wanted: Quantization, device: str, dtype: str | None) -> None:
    """SettingsError where torchao is not installed, or the device or the deployment's dtype does not go with it."""
    if find_spec(LIBRARY) is None:
        message = f"{wanted} needs {LIBRARY}, which is not installed"
        raise SettingsError(Mistake(key=SETTING, message=message, fix="pip install 'sdpipeline[quantize]'"))
    if wanted == "fp8" and (lack := _lacks_fp8(torch.device(device))):
        message = f"fp8 needs a GPU of compute capability {_dotted(FP8_CAPABILITY)} or more, and {lack}"
        raise SettingsError(Mistake(key=SETTING, message=message, fix="set it to int8, or leave it out"))
    if wanted == "fp8" and dtype != FP8_DTYPE:
        message = f"fp8 goes with {FP8_DTYPE} alone"
        raise SettingsError(Mistake(key=SETTING, message=message, fix=f"set SDP_ENGINE__DTYPE={FP8_DTYPE} beside it"))


def library_of(quantized: Quantization | None) -> dict[str, str]:
    """What quantized, with its version, for the record; nothing where nothing was."""
    return {LIBRARY: version(LIBRARY)} if quantized else {}


def quantize(network: torch.nn.Module, wanted: Quantization) -> None:
    """Exchange the weights of a network's large linear layers for eight-bit ones, for good.

    Activations are scaled row by row while the network runs, so that no row depends on its neighbours in a batch.
    """
    from torchao.quantization import quantize_

    weight = next(network.parameters())
    if wanted == "fp8" and weight.dtype != getattr(torch, FP8_DTYPE):
        raise RequestRefusedError(f"profile: fp8 goes with {FP8_DTYPE} alone, and this would run in {weight.dtype}")
    quantize_(network, _configuration(wanted, weight.device), filter_fn=_is_large)


def size_bytes(tensor: torch.Tensor) -> int:
    """What a tensor occupies; a quantized one says the type that it stands for and is made of others."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()
    return sum(size_bytes(getattr(tensor, name)) for name in names)


def _configuration(wanted: Quantization, device: torch.device) -> Any:
    """Without torchao's own settings for the compiler, which would hold for the whole process from then on."""
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
        reduce_range=should_reduce_range(device),  # sums overflow in silence on CPUs that lack VNNI
    )


def _is_large(module: torch.nn.Module, name: str) -> bool:
    if not isinstance(module, torch.nn.Linear) or any(part in name for part in PER_PICTURE):
        return False
    return module.in_features % SIDE == 0 and module.out_features % SIDE == 0


def _lacks_fp8(device: torch.device) -> str | None:
    """Why this device cannot multiply in fp8."""
    if device.type != "cuda":
        return f"this worker's device is {device}"
    has = torch.cuda.get_device_capability(device)
    return None if has >= FP8_CAPABILITY else f"{torch.cuda.get_device_name(device)} has {_dotted(has)}"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
