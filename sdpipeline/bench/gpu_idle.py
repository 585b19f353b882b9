"""Idle share of a GPU, from a trace of its kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile


def idle_share(device: str, act: Callable[[], object]) -> float | None:
    """Return the share, 0 to 1, of the duration of ``act`` in which the GPU is idle; None without a GPU."""
    on = torch.device(device)
    if on.type != "cuda":
        return None
    torch.cuda.synchronize(on)
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        started = time.perf_counter()
        act()
        torch.cuda.synchronize(on)
        took_us = (time.perf_counter() - started) * 1e6
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in traced.events() or ()
        if str(event.device_type) == "DeviceType.CUDA"
    ]
    return round(1 - min(1.0, covered(kernels) / took_us), 4)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans, which may overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
