"""Classification of GAN upscalers: the factor comes from their tensors."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdpipeline.engine.classification.classification import Classification, unsupported
from sdpipeline.engine.classification.loras import Shape
from sdpipeline.errors import CheckpointError

SMALL = 64
"""Most elements of a tensor whose values spandrel may read to detect an architecture."""

MISFITS = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError)
"""Exceptions of spandrel's architectures for tensors that only resemble their own."""

_STARTS = re.compile(
    r"^(?:(?:module\.|params(?:_ema)?\.|generator\.)?)(?:conv_first|conv_body|conv_before_upsample|trunk_conv|RRDB_trunk|"
    r"upconv|conv_up|HRconv|upsample[.\d]|shallow_feat|to_feat|head\.0|body\.\d+\.|feats\.|layers\.\d+\.residual_group|"
    r"block_1\.|conv_1\.|model\.\d+\.(?:weight|bias|sub\.)|m_head|in_to_feat|dtb)"
)
_INSTALL = (
    "install the extra with `pip install 'sdpipeline[upscalers]'`, which detects more architectures, and add it again"
)


def upscaler(alias: str, path: Path | None, tensors: Mapping[str, Shape]) -> Classification | None:
    """Return the factor of a GAN upscaler; None for other files.

    spandrel detects the architecture where it is installed; else ESRGAN, Real-ESRGAN's compact network and
    SwinIR's kind are read from the shapes. Raises CheckpointError if it looks like an upscaler whose factor cannot be
    told.
    """
    similar = any(_STARTS.match(name) for name in tensors)
    spandrel = _spandrel()
    if spandrel is not None and path is not None:
        return _detected(alias, spandrel, path, tensors, similar=similar)
    if not similar:
        return None
    scale = esrgan_scale(tensors) or compact_scale(tensors) or shuffled_scale(tensors)
    if scale is not None:
        return Classification(kind="checkpoint", family="gan-upscale", scale=scale)
    raise CheckpointError(
        f"checkpoint {alias!r} looks like a GAN upscaler, but its tensors do not tell its factor here; {_INSTALL}"
    )


def _spandrel() -> Any:
    try:
        return importlib.import_module("spandrel")  # optional: it needs torchvision, which pins its own torch
    except ImportError:
        return None


def _detected(
    alias: str, spandrel: Any, path: Path, tensors: Mapping[str, Shape], *, similar: bool
) -> Classification | None:
    """Ask spandrel, with zeros that take no memory in place of large tensors."""
    import safetensors
    import torch

    with safetensors.safe_open(path, framework="pt") as file:
        state = {
            name: file.get_tensor(name) if math.prod(shape) <= SMALL else torch.zeros(()).expand(*shape)
            for name, shape in tensors.items()
        }
    try:
        descriptor = spandrel.ModelLoader(device="cpu").load_from_state_dict(state)
    except (spandrel.UnsupportedModelError, *MISFITS) as error:
        if not similar:
            return None
        raise CheckpointError(
            f"checkpoint {alias!r} looks like a GAN upscaler, but spandrel cannot read it ({error}); use another one"
        ) from error
    if descriptor.purpose != "SR" or descriptor.input_channels != 3:
        what = f"a network ({descriptor.architecture.name}) that does not enlarge RGB pictures"
        raise unsupported(alias, what, "use an upscaler")
    return Classification(kind="checkpoint", family="gan-upscale", scale=int(descriptor.scale))


def esrgan_scale(tensors: Mapping[str, Shape]) -> int | None:
    """Return the factor of an ESRGAN in its old or new names; None for other networks.

    Each upsampling convolution doubles the size; Real-ESRGAN's x1 and x2 networks first fold pixels into channels:
    https://github.com/xinntao/Real-ESRGAN (RRDBNet).
    """
    new = [re.match(r"(?:upconv|conv_up)_?(\d)\.weight$", name) for name in tensors]
    doublings = max((int(match[1]) for match in new if match), default=0)
    first = tensors.get("conv_first.weight")
    if "model.0.weight" in tensors and any(name.startswith("model.1.sub.") for name in tensors):
        last = max(int(match[1]) for name in tensors if (match := re.match(r"model\.(\d+)\.", name)))
        doublings, first = (last - 4) // 3, tensors["model.0.weight"]
    elif not any(re.match(r"(?:body|RRDB_trunk)\.0\.(?:rdb|RDB)1\.", name) for name in tensors):
        return None
    if first is None or len(first) != 4 or first[1] not in (3, 12, 48):
        return None
    return _whole(2**doublings / math.isqrt(first[1] // 3))


def compact_scale(tensors: Mapping[str, Shape]) -> int | None:
    """Return the factor of Real-ESRGAN's SRVGGNetCompact, whose last convolution has 3 channels for each pixel."""
    names = [re.match(r"body\.(\d+)\.(?:weight|bias)$", name) for name in tensors]
    if not all(names):
        return None
    last = max(int(match[1]) for match in names if match)
    first, end = tensors.get("body.0.weight"), tensors.get(f"body.{last}.weight")
    if not first or not end or len(first) != 4 or len(end) != 4 or first[1] != 3 or last < 2:
        return None
    return _whole(math.sqrt(end[0] / 3))


def shuffled_scale(tensors: Mapping[str, Shape]) -> int | None:
    """Return the factor of SwinIR and its successors (HAT, DAT, ATD), which shuffle channels into pixels.

    Each convolution of ``upsample`` has 4 or 9 output channels for each input channel; the light variant has one
    convolution straight to 3 channels for each pixel: https://github.com/JingyunLiang/SwinIR (Upsample).
    """
    shapes = [shape for name, shape in tensors.items() if re.match(r"upsample\.(?:\d+\.)?weight$", name)]
    if not shapes or any(len(shape) != 4 or not shape[1] for shape in shapes) or "conv_first.weight" not in tensors:
        return None
    if "conv_before_upsample.0.weight" not in tensors:
        return _whole(math.sqrt(shapes[0][0] / 3)) if len(shapes) == 1 else None
    if "conv_up1.weight" in tensors:
        return None
    return _whole(math.prod(math.sqrt(shape[0] / shape[1]) for shape in shapes))


def _whole(scale: float) -> int | None:
    return int(scale) if scale.is_integer() and 2 <= scale <= 16 else None
