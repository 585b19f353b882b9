"""GAN upscalers through spandrel: no prompt, no noise; large pictures run in overlapping tiles."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from sdpipeline.engine import Pixels
from sdpipeline.engine.checkpoints import CheckpointFiles
from sdpipeline.engine.pixels import to_pixels
from sdpipeline.errors import CheckpointError, DeviceExhaustedError

TILES = (512, 256, 128)
"""Sides of a tile, from the fastest to the one that needs least memory."""
OVERLAP = 32
"""Input pixels around a tile that the network reads but does not keep, so that no seam is visible."""


def load_upscaler(files: CheckpointFiles, dtype: torch.dtype) -> torch.nn.Module:
    """Load the network of a safetensors file, recognised by its tensors."""
    try:
        spandrel = importlib.import_module("spandrel")  # optional: it needs torchvision, which pins its own torch
    except ImportError as error:
        raise CheckpointError(
            f"checkpoint {files.alias!r} is a GAN upscaler, which needs sdpipeline[upscalers] installed"
        ) from error
    tensors = load_file(files.directory / next(name for name in files.manifest if name.endswith(".safetensors")))
    try:
        descriptor = spandrel.ModelLoader(device="cpu").load_from_state_dict(tensors)
    except spandrel.UnsupportedModelError as error:
        raise CheckpointError(f"checkpoint {files.alias!r} is not an upscaler that spandrel supports") from error
    if descriptor.scale != files.scale:
        raise CheckpointError(
            f"checkpoint {files.alias!r} enlarges by {descriptor.scale}, not by {files.scale} as it was registered; "
            "register it again under a new alias"
        )
    if not isinstance(descriptor, spandrel.ImageModelDescriptor) or descriptor.input_channels != 3:
        raise CheckpointError(f"checkpoint {files.alias!r} takes more than one RGB picture; use another upscaler")
    return Upscaler(descriptor).eval().to(dtype if descriptor.supports_half else torch.float32)


class Upscaler(torch.nn.Module):
    """A spandrel descriptor as a torch module, which can be moved, measured and called."""

    def __init__(self, descriptor: Any) -> None:
        super().__init__()
        self.network = descriptor.model
        self._call = descriptor

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Enlarge pictures from 0 to 1; the descriptor pads to the sizes that its network takes."""
        enlarged: torch.Tensor = self._call(pictures)
        return enlarged


def upscale(
    network: torch.nn.Module, pixels: Pixels, scale: int, *, free: Callable[[], None], exact: bool = False
) -> tuple[Pixels, list[str]]:
    """Enlarge a picture; return it with the out-of-memory fallbacks taken. ``exact`` allows none."""
    tiles = TILES[:1] if exact else TILES
    for tile in tiles:
        try:
            made = enlarge(network, pixels, scale, tile=tile)
        except torch.OutOfMemoryError:
            made = None  # leave the except block first: the traceback holds the tensors that have to be freed
        if made is not None:
            return made, [] if tile == TILES[0] else [f"tiles of {tile} instead of {TILES[0]}: out of memory"]
        free()
    raise DeviceExhaustedError(f"out of memory for a tile of {tiles[-1]} pixels")


def enlarge(network: torch.nn.Module, pixels: Pixels, scale: int, *, tile: int) -> Pixels:
    """Enlarge a picture tile by tile, each with a margin of ``OVERLAP`` pixels as context."""
    height, width = pixels.shape[:2]
    enlarged = np.empty((height * scale, width * scale, 3), np.uint8)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            y, x = max(0, top - OVERLAP), max(0, left - OVERLAP)
            seen = pixels[y : min(bottom + OVERLAP, height), x : min(right + OVERLAP, width)]
            made = _run(network, seen)
            kept = made[(top - y) * scale : (bottom - y) * scale, (left - x) * scale : (right - x) * scale]
            enlarged[top * scale : bottom * scale, left * scale : right * scale] = kept
    return enlarged


def _run(network: torch.nn.Module, pixels: Pixels) -> Pixels:
    weight = next(network.parameters())
    values = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    with torch.no_grad():
        made = network(values.to(weight.device, weight.dtype) / 255)
    return to_pixels(made[0].permute(1, 2, 0).float().cpu().numpy())
