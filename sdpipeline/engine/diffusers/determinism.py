"""Deterministic arithmetic, bit for bit, for requests with ``reproducibility: strict``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def allow_exactness() -> None:
    """Set a fixed workspace size for cuBLAS, which reads it once, before its first multiplication."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def exactly(*, wanted: bool) -> Iterator[None]:
    """Use deterministic algorithms and full float32 inside the block; torch raises RuntimeError if it has none."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode=True)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.use_deterministic_algorithms(mode=before)
