"""Safety checker: compares CLIP embeddings of finished pictures with those of unwanted concepts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdpipeline.engine import Pixels
from sdpipeline.engine.diffusers.loading import Loaded
from sdpipeline.engine.pixels import to_pil


def flagged(loaded: Loaded, pictures: Sequence[Pixels]) -> list[bool]:
    """Return True for each picture that is close to a concept, by the thresholds in the checker's own weights."""
    network, processor = loaded.parts["safety_checker"], loaded.parts["processor"]
    inputs = processor(images=[to_pil(pixels) for pixels in pictures], return_tensors="pt")
    seen = inputs["pixel_values"].to(network.device, network.dtype)
    # The checker blackens flagged images, and its output images are not used here, so zeros are enough.
    _, found = network(clip_input=seen, images=torch.zeros(len(pictures), 1))
    return [bool(each) for each in found]
