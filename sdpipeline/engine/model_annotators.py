"""Annotators with weights: depth, segmentation and pose, through transformers."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from sdpipeline.engine import Pixels
from sdpipeline.engine.diffusers.loading import Loaded
from sdpipeline.engine.pixels import to_pil

ARMS = ((5, 7), (7, 9), (6, 8), (8, 10))
LEGS = ((11, 13), (13, 15), (12, 14), (14, 16))
TRUNK_AND_HEAD = ((17, 5), (17, 6), (17, 11), (17, 12), (17, 0), (0, 1), (1, 3), (0, 2), (2, 4))
LIMBS = (*ARMS, *LEGS, *TRUNK_AND_HEAD)
"""Pairs of COCO's 17 keypoints that a skeleton connects; 17 is the neck, halfway between the shoulders."""


def annotate_with(loaded: Loaded, kind: str, pixels: Pixels, parameters: Mapping[str, float]) -> Pixels:
    """Draw the control map of a picture, of the same size."""
    network, processor = loaded.parts["annotator"], loaded.parts["processor"]
    if kind == "pose":
        return _pose(network, processor, pixels, **parameters)
    inputs = processor(images=to_pil(pixels), return_tensors="pt")
    with torch.no_grad():
        output = network(pixel_values=inputs["pixel_values"].to(network.device, network.dtype))
    if kind == "depth":
        return _depth(output.predicted_depth[:, None], pixels)
    return _segmentation(output.logits, pixels, _palette(loaded, output.logits.shape[1]))


def _depth(depth: torch.Tensor, pixels: Pixels) -> Pixels:
    """Draw depth with near in white; each picture's values are stretched from black to white."""
    sized = torch.nn.functional.interpolate(depth.float(), pixels.shape[:2], mode="bicubic")[0, 0]
    values = sized.cpu().numpy()
    spread = max(float(np.ptp(values)), 1e-6)
    gray = np.asarray((values - values.min()) / spread * 255).round().astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2)


def _segmentation(logits: torch.Tensor, pixels: Pixels, palette: npt.NDArray[np.uint8]) -> Pixels:
    sized = torch.nn.functional.interpolate(logits.float(), pixels.shape[:2], mode="bilinear")[0]
    return np.asarray(palette[sized.argmax(dim=0).cpu().numpy()], dtype=np.uint8)


def _palette(loaded: Loaded, count: int) -> npt.NDArray[np.uint8]:
    """Return the directory's own colours, else hues spread over the colour circle."""
    if "palette" in loaded.options:
        return np.array(loaded.options["palette"], dtype=np.uint8)
    hues = [colorsys.hsv_to_rgb(n * 0.618034 % 1, 0.85, 0.95) for n in range(count)]
    return np.array([[round(channel * 255) for channel in hue] for hue in hues], dtype=np.uint8)


def _pose(network: Any, processor: Any, pixels: Pixels, *, confidence: float) -> Pixels:
    """Draw the skeleton of one person, who has to fill the picture: no person detector runs first."""
    height, width = pixels.shape[:2]
    boxes = [[[0.0, 0.0, float(width), float(height)]]]
    inputs = processor(to_pil(pixels), boxes=boxes, return_tensors="pt")
    with torch.no_grad():
        output = network(pixel_values=inputs["pixel_values"].to(network.device, network.dtype))
    person = processor.post_process_pose_estimation(output, boxes=boxes)[0][0]
    points, scores = person["keypoints"].float().cpu().numpy(), person["scores"].float().cpu().numpy()
    return _skeleton(points, scores >= confidence, (height, width))


def _skeleton(points: npt.NDArray[np.float32], seen: npt.NDArray[np.bool_], size: tuple[int, int]) -> Pixels:
    points = np.vstack([points, (points[5] + points[6]) / 2])
    seen = np.append(seen, seen[5] and seen[6])
    canvas = np.zeros((*size, 3), np.uint8)
    thickness = max(1, min(size) // 100)
    for n, (start, end) in enumerate(LIMBS):
        if seen[start] and seen[end]:
            hue = colorsys.hsv_to_rgb(n / len(LIMBS), 1.0, 1.0)
            ends = [(int(points[k][0]), int(points[k][1])) for k in (start, end)]
            cv2.line(canvas, ends[0], ends[1], [round(channel * 255) for channel in hue], thickness, cv2.LINE_AA)
    return canvas
