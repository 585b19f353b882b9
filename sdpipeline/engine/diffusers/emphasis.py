"""Emphasis: the weights of a prompt's tokens, applied to a text encoder's output."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def emphasised(states: torch.Tensor, weights: Sequence[Sequence[float]]) -> torch.Tensor:
    """Multiply hidden states by their tokens' weights, and restore the mean of each chunk.

    ``states`` are chunks x tokens x width, ``weights`` chunks x tokens, with 1 for start, end and padding. A chunk
    without weights keeps its bits. This is the emphasis ``Original`` of AUTOMATIC1111/stable-diffusion-webui
    (``modules/sd_emphasis.py``), with one difference: we compute in float32, whatever the encoder's dtype.
    """
    if all(weight == 1.0 for chunk in weights for weight in chunk):
        return states
    return torch.stack([_chunk(chunk, own) for chunk, own in zip(states, weights, strict=True)])


def _chunk(states: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    if all(weight == 1.0 for weight in weights):
        return states
    exact = states.float()
    weighted = exact * torch.tensor(weights, device=states.device)[:, None]
    return (weighted * (exact.mean() / weighted.mean())).to(states.dtype)
