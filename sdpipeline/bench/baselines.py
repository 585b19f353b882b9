"""Baselines of the benchmarks: diffusers in a loop, one prompt at a time, and the device's matmul ceiling."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sdpipeline.bench.workload import Workload
from sdpipeline.engine.families import SCHEDULERS

CEILING_SIZES = {"cpu": 1024, "cuda": 8192}
CEILING_S = 0.5
"""Seconds of matrix products in each round; the fastest product counts."""


class PlainLoop:
    """Pipeline as in diffusers' own documentation, with the same weights, device, dtype and scheduler."""

    def __init__(self, directory: Path, workload: Workload, *, device: str, dtype: str) -> None:
        self._device, self._workload = torch.device(device), workload
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        pipe: Any = diffusers.DiffusionPipeline.from_pretrained(
            directory,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
        class_name, overrides = SCHEDULERS[workload.scheduler]
        pipe.scheduler = getattr(diffusers, class_name).from_config(pipe.scheduler.config, **overrides)
        pipe.set_progress_bar_config(disable=True)
        self._pipe = pipe.to(self._device)

    def picture(self, number: int) -> Any:
        """Make one picture, as a Pillow image."""
        asked = self._workload.request(number)
        return self._pipe(
            asked.prompt,
            width=asked.width,
            height=asked.height,
            num_inference_steps=asked.num_inference_steps,
            guidance_scale=asked.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(asked.seed),
        ).images[0]

    def png(self, number: int) -> bytes:
        """Make one picture, as the PNG file that ``save`` writes."""
        file = io.BytesIO()
        self.picture(number).save(file, format="PNG")
        return file.getvalue()

    def flops(self, number: int) -> int:
        """Count the floating-point operations of one picture, including prompt and decoding.

        A multiplication with an addition counts as two.
        """
        # Only this attention backend is counted on every device.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.picture(number)
        return int(counter.get_total_flops())


def matmul_ceiling(device: str, dtype: str) -> float:
    """Measure the TFLOP/s of the fastest large matrix product, which no network exceeds."""
    on, size = torch.device(device), CEILING_SIZES.get(torch.device(device).type, 1024)
    left, right = (torch.randn(size, size, device=on).to(getattr(torch, dtype)) for _ in range(2))
    fastest, deadline = float("inf"), time.perf_counter() + CEILING_S
    while time.perf_counter() < deadline or fastest == float("inf"):
        synchronize(on)
        started = time.perf_counter()
        torch.mm(left, right)
        synchronize(on)
        fastest = min(fastest, time.perf_counter() - started)
    return float(2 * size**3 / fastest / 1e12)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gib(device: str) -> float | None:
    """Return the peak memory that torch allocated on a GPU in this process; None without a GPU."""
    on = torch.device(device)
    return round(torch.cuda.max_memory_allocated(on) / 2**30, 2) if on.type == "cuda" else None
