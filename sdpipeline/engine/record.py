"""JSON record of what actually ran for a picture, in one format for every engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sdpipeline.domain import GenerationRequest, Json, Reproducibility

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "numpy", "opencv-python-headless", "sdpipeline")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Device, dtype, pipeline and libraries of a forward pass."""

    engine: str
    family: str
    pipeline: str
    scheduler: Mapping[str, Any]
    device: str
    dtype: str
    bucket: int
    libraries: Mapping[str, str]
    shortcuts: Mapping[str, Any] = field(default_factory=dict)


def ran(
    request: GenerationRequest,
    setting: Setting,
    *,
    slot: int,
    fallbacks: Sequence[str] = (),
    details: Mapping[str, Any] | None = None,
) -> Json:
    """Return one picture's part of the record; ``details`` are fields that only some tasks have."""
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
        "profile": {"name": request.profile, **setting.shortcuts},
        "bucket": setting.bucket,
        "slot": slot,
        "fallbacks": list(fallbacks),
        "libraries": dict(setting.libraries),
        **(details or {}),
    }


def held(request: GenerationRequest) -> Reproducibility:
    """Return the effective reproducibility of this picture; ``fast`` in older requests means ``tolerant``."""
    return "strict" if request.exact else "tolerant"


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that determine pixels, without those that are not installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _json(value: Any) -> Any:
    """Convert to JSON: schedulers' configurations hold infinities, tuples and arrays, which JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bool | int | float):
        return value
    return [_json(item) for item in value] if isinstance(value, Iterable) else str(value)
