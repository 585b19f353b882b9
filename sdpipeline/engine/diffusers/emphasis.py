"""Emphasis: the weights of a prompt's tokens, applied to a text encoder's output."""

from __future__ import annotations

from collections.abc import Sequence

import torch

NOISE = 1e-4
"""Largest mean that is taken for rounding noise, as a part of the mean magnitude; published encoders have far more.

The final normalisation of an encoder that was never trained leaves a mean of zero: its noise cannot be divided by.
"""


def emphasised(states: torch.Tensor, weights: Sequence[Sequence[float]]) -> torch.Tensor:
    """Multiply hidden states by their tokens' weights, and restore the mean of each chunk.

    ``states`` are chunks x tokens x width, ``weights`` chunks x tokens, with 1 for start, end and padding. A chunk
    without weights keeps its bits. This is the emphasis ``Original`` of AUTOMATIC1111/stable-diffusion-webui
    (``modules/sd_emphasis.py``), with two differences: we compute in float32, whatever the encoder's dtype, and a mean
    that is only rounding noise is not restored, as in its emphasis ``No norm``.
    """
    if all(weight == 1.0 for chunk in weights for weight in chunk):
        return states
    return torch.stack([_chunk(chunk, own) for chunk, own in zip(states, weights, strict=True)])


def _chunk(states: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    if all(weight == 1.0 for weight in weights):
        return states
    exact = states.float()
    weighted = exact * torch.tensor(weights, device=states.device)[:, None]
    before, after = exact.mean(), weighted.mean()
    if min(before.abs(), after.abs()) <= NOISE * exact.abs().mean():
        return weighted.to(states.dtype)
    return (weighted * (before / after)).to(states.dtype)
