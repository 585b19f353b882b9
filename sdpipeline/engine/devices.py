"""Devices of this machine, and those that its workers use."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from sdpipeline.settings import Settings

QUERY_TIMEOUT_S = 20.0


def gpu_count() -> int:
    """Return the number of CUDA devices that torch detects; 0 if torch is not installed."""
    try:
        import torch
    except ModuleNotFoundError:
        return 0
    return int(torch.cuda.device_count())


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use, from the driver: a dispatcher has no torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in {"", "-1"}]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=index", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            query,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=QUERY_TIMEOUT_S,
            check=True,
        )
    except (subprocess.SubprocessError, OSError):
        return []  # a driver that does not answer shows no GPU
    return answer.stdout.split()


def pinned_device(settings: Settings) -> str | None:
    """Return the one device that ``SDP_DEVICE`` names; None if it names none or ``cuda``, which means every GPU."""
    return settings.device if settings.device != "cuda" else None


def devices(settings: Settings) -> list[str]:
    """Return the devices of this machine's workers: those of the settings, else every GPU, else the CPU."""
    if settings.device is not None:
        return [settings.device] * (settings.workers or 1)
    gpus = gpu_count()
    if not gpus:
        return ["cpu"] * (settings.workers or 1)
    return [f"cuda:{n % gpus}" for n in range(settings.workers or gpus)]


def is_present(device: str) -> bool:
    """Return True if ``cpu``, ``cuda`` or ``cuda:N`` is a device of this machine."""
    named = re.fullmatch(r"cuda(?::(\d+))?", device)
    return device == "cpu" or (named is not None and int(named[1] or 0) < gpu_count())
