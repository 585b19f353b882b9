"""JSON record of what actually ran for a picture, in one format for every engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import ConfigDict, with_config

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


@with_config(ConfigDict(use_attribute_docstrings=True))
@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """Execution of a request: everything that may change the pixels and that the request leaves open.

    Fields that only some tasks and families have are ``None`` otherwise, and absent from the document.
    """

    engine: str
    """Engine: `diffusers`, or `fake` in load tests."""
    task: str
    """Task of the request."""
    family: str
    """Family of the base checkpoint."""
    pipeline: str
    """Class of the pipeline."""
    checkpoints: Sequence[Mapping[str, str]]
    """Alias and digest of every checkpoint, the base first."""
    seed: int
    """Seed of the noise."""
    scheduler: Mapping[str, Any]
    """Name and configuration of the scheduler."""
    num_inference_steps: int
    """Number of denoising steps."""
    guidance_scale: float
    """Guidance scale."""
    device: str
    """Type of device."""
    dtype: str
    """Data type of the latents."""
    reproducibility: str
    """Effective reproducibility."""
    profile: Mapping[str, Any] | None = None
    """Name of the profile, with the optimisations that were on; older releases had none."""
    bucket: int
    """Number of pictures in the batch, with padding."""
    slot: int
    """Position in the batch."""
    fallbacks: Sequence[str]
    """Out-of-memory fallbacks that were taken."""
    libraries: Mapping[str, str]
    """Versions of the libraries that determine pixels."""
    prompt: str | None = None
    """`not used`, if the checkpoint takes no prompt."""
    prompt_tokens: int | None = None
    """Length of the prompt's embeddings, in tokens."""
    prompt_weights: Mapping[str, Any] | None = None
    """Weights of the parts of weighted prompts, and the reference whose emphasis applied them."""
    strength: float | None = None
    """Effective strength, with the family's default."""
    noise_level: int | None = None
    """Effective noise level, with the family's default."""
    latent_statistics: Mapping[str, Sequence[float]] | None = None
    """Mean and standard deviation of the latents by channel, if the autoencoder's configuration has them; older
    releases decoded without them."""
    clip_skip: int | None = None
    """Layers of the text encoder that were skipped."""
    resize: str | None = None
    """Way in which the input was resized."""
    calls: Sequence[Sequence[int]] | None = None
    """Network calls that the picture shared, as pairs of rows and number of consecutive calls."""
    loras: Sequence[Mapping[str, Any]] | None = None
    """LoRAs with alias, digest and weight."""
    textual_inversions: Sequence[Mapping[str, Any]] | None = None
    """Textual inversions with alias, digest and weight."""
    ip_adapters: Sequence[Mapping[str, Any]] | None = None
    """IP-Adapters with alias, digest and weight."""
    controlnets: Sequence[Mapping[str, Any]] | None = None
    """ControlNets with their annotator and scales."""
    unmasked_pixels: str | None = None
    """Origin of the pixels outside the mask."""
    safety_checkers: Sequence[Mapping[str, str]] | None = None
    """Safety checkers that passed the picture, with alias and digest."""

    def to_document(self) -> Json:
        """Return the execution as the record's ``ran``, without absent fields."""
        document = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in document.items() if value is not None}


def ran(
    request: GenerationRequest,
    setting: Setting,
    *,
    slot: int,
    fallbacks: Sequence[str] = (),
    details: Mapping[str, Any] | None = None,
) -> Json:
    """Return one picture's part of the record; ``details`` are fields that only some tasks have."""
    execution = Execution(
        engine=setting.engine,
        task=str(request.task),
        family=setting.family,
        pipeline=setting.pipeline,
        checkpoints=[{"alias": ref.alias, "digest": ref.digest} for ref in request.checkpoints()],
        seed=request.seed,
        scheduler=_json(setting.scheduler),
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        device=setting.device,
        dtype=setting.dtype,
        reproducibility=held(request),
        profile={"name": request.profile, **setting.shortcuts},
        bucket=setting.bucket,
        slot=slot,
        fallbacks=list(fallbacks),
        libraries=dict(setting.libraries),
        **(details or {}),
    )
    return execution.to_document()


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
