"""Batching rules: which jobs may share a forward pass, and how many at once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sdpipeline.domain import GenerationRequest, Json, digest, to_document

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes. Batches are padded to one of them, because only equal shapes give bit-equal pictures."""

FREE_PARAMETERS = (
    "prompt",
    "negative_prompt",
    "prompt_syntax",
    "seed",
    "image",
    "mask_image",
    "guidance_scale",
    "output",
)
"""Parameters that may differ within a batch: each is a per-image tensor or applies outside the engine."""

STEPWISE_PARAMETERS = ("num_inference_steps", "strength", "scheduler")
"""Parameters that may also differ between pictures of a profile that shares single network calls."""
STEPWISE_CONTROL = ("control_guidance_start", "control_guidance_end")


def batch_key(request: GenerationRequest) -> str:
    """Return the hash, 64 hexadecimal digits, of everything that must be equal within a batch."""
    return digest(batch_document(request))


def batch_document(request: GenerationRequest) -> Json:
    """Return the values that :func:`batch_key` hashes, as ``plan`` and ``status`` show them."""
    stepwise = request.profile != "exact"
    free = FREE_PARAMETERS + STEPWISE_PARAMETERS if stepwise else FREE_PARAMETERS
    document: Json = {k: v for k, v in to_document(request).items() if k not in free}
    if not stepwise:
        document["guidance"] = request.guidance_scale > 1.0
    document["images"] = sorted(request.sources())
    if "controlnets" in document:
        document["controlnets"] = [_shared_part(use) for use in document["controlnets"]]
        if stepwise:
            document["controlnets"] = [_without(use, STEPWISE_CONTROL) for use in document["controlnets"]]
    for name in ("ip_adapters",):
        if name in document:
            document[name] = [_shared_part(use) for use in document[name]]
    shared: Json = _digests_only(document)
    return shared


def bucket_for(count: int) -> int:
    """Return the smallest bucket that holds ``count`` pictures; ``count`` is 1 to 64."""
    return next(size for size in BUCKETS if size >= count)


def split(count: int, cap: int) -> list[int]:
    """Return the batch sizes for ``count`` jobs: full buckets of at most ``cap``, then one for the rest."""
    largest = max(size for size in BUCKETS if size <= max(1, cap))
    whole, rest = divmod(count, largest)
    return [largest] * whole + ([rest] if rest else [])


def _shared_part(use: Json) -> Json:
    return _without(use, ("image", "controlnet_conditioning_scale"))


def _without(document: Json, names: Collection[str]) -> Json:
    return {k: v for k, v in document.items() if k not in names}


def _digests_only(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _digests_only(item) for key, item in value.items() if key != "alias"}
    return [_digests_only(item) for item in value] if isinstance(value, list) else value
