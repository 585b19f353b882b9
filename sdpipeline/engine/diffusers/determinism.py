"""Arithmetic that repeats itself bit for bit, for the requests that ask for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def allow_exactness() -> None:
    """Have cuBLAS keep a workspace of fixed size; it reads this once, before its first multiplication."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def exactly(*, wanted: bool) -> Iterator[None]:
    """Deterministic algorithms and whole float32 while the block runs; torch raises RuntimeError where it has none."""
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
