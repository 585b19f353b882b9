"""Devices of this machine."""

from __future__ import annotations


def gpu_count() -> int:
    """Return the number of CUDA devices that torch detects; 0 if torch is not installed."""
    try:
        import torch
    except ModuleNotFoundError:
        return 0
    return int(torch.cuda.device_count())
