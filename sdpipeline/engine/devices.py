"""What this machine can run on."""

from __future__ import annotations


def gpu_count() -> int:
    """CUDA devices that torch sees; 0 where torch is not installed."""
    try:
        import torch
    except ModuleNotFoundError:
        return 0
    return int(torch.cuda.device_count())
