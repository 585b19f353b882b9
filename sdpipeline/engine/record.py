"""What actually ran, as the JSON that goes into a picture's record: one shape for every engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sdpipeline.domain import GenerationRequest, Json, Reproducibility
from sdpipeline.engine.stepwise.profiles import PROFILES

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "numpy", "opencv-python-headless", "sdpipeline")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where and how a forward pass ran."""

    engine: str
    family: str
    pipeline: str
    scheduler: Mapping[str, Any]
    device: str
    dtype: str
    bucket: int
    libraries: Mapping[str, str]


def ran(
    request: GenerationRequest,
    setting: Setting,
    *,
    slot: int,
    fallbacks: Sequence[str] = (),
    details: Mapping[str, Any] | None = None,
) -> Json:
    """One picture's part of the record; ``details`` are what only some tasks have."""
    return {
        "engine": setting.engine,
        "task": str(request.task),
        "family": setting.family,
        "pipeline": setting.pipeline,
        "checkpoints": [{"alias": ref.alias, "digest": ref.digest} for ref in request.checkpoints()],
        "seed": request.seed,
        "scheduler": _json(setting.scheduler),
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "device": setting.device,
        "dtype": setting.dtype,
        "reproducibility": held(request),
        "profile": {"name": request.profile} | PROFILES[request.profile].document(),
        "bucket": setting.bucket,
        "slot": slot,
        "fallbacks": list(fallbacks),
        "libraries": dict(setting.libraries),
        **(details or {}),
    }


def held(request: GenerationRequest) -> Reproducibility:
    """What held for this picture; ``fast``, which older requests say, means ``tolerant``."""
    return "strict" if request.exact else "tolerant"


def library_versions() -> dict[str, str]:
    """Versions of what determines pixels; what is not installed is left out."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _json(value: Any) -> Any:
    """Schedulers' configurations hold infinities, tuples and arrays, which JSON has not."""
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bool | int | float):
        return value
    return [_json(item) for item in value] if isinstance(value, Iterable) else str(value)
