"""Limits of a worker."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """Limits of a worker.

    ``max_batch`` is pictures per forward pass, ``lease_ttl_s`` the lease duration, ``max_pixels`` the largest input.
    ``gpu_second_cost`` is the price of a device second. ``shutdown_grace_s`` limits the shutdown once ``stop`` is set.
    ``deliverers`` is the number of pictures that are encoded, marked and stored at the same time.
    """

    max_batch: int
    lease_ttl_s: float
    max_pixels: int
    gpu_second_cost: float = 0.0
    shutdown_grace_s: float = math.inf
    deliverers: int = 4
