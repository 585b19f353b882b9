"""Classification of IP-Adapters and textual inversions by their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sdpipeline.engine.classification.classification import Classification, unsupported
from sdpipeline.engine.classification.loras import Shape
from sdpipeline.engine.classification.networks import CONTEXTS, TINY

_ENCODERS = frozenset({"clip_l", "clip_g", "t5", "t5xxl", "llama", "qwen"})
"""Names of the tensors of textual inversions for several text encoders."""
_NO_TOKEN = (".weight", ".bias", ".alpha", ".scale", ".diff", "_ids")


def ip_adapter(alias: str, tensors: Mapping[str, Shape]) -> Classification | None:
    """Return the family of an IP-Adapter; None for other files, CheckpointError for one that does not run here."""
    if any("ip_adapter_double_stream" in name or name.startswith("ip_adapter_proj_model.") for name in tensors):
        raise unsupported(alias, "an IP-Adapter for Flux", _FIX)
    if not any(name.startswith(("image_proj.", "ip_adapter.")) for name in tensors):
        return None
    widths = {shape[-1] for name, shape in tensors.items() if "to_k_ip" in name and len(shape) == 2}
    family = next((CONTEXTS[width] for width in (2048, 1024, 768) if width in widths), None)
    if family is None and any(width > TINY for width in widths):
        raise unsupported(alias, f"an IP-Adapter for text embeddings of {max(widths)}, as those of SD3 and Flux", _FIX)
    if _reads_faces(tensors):
        raise unsupported(alias, "an IP-Adapter FaceID (it reads a face's embedding, not a picture)", _FIX)
    return Classification(kind="ip-adapter", family=family or "any")


def _reads_faces(tensors: Mapping[str, Shape]) -> bool:
    """Return True for FaceID, FaceID Plus, FaceID Portrait and InstantID, whose input is a face's 512 numbers."""
    if any(name.startswith(("image_proj.perceiver_resampler.", "ip_adapter.0.to_q_lora")) for name in tensors):
        return True
    if list(tensors.get("image_proj.proj_in.weight", ()))[1:] == [512]:
        return True
    projected = {"image_proj.proj.0.weight", "image_proj.proj.2.weight"} <= tensors.keys()
    return projected and "image_proj.norm.weight" in tensors


_FIX = "supported are plain, plus and full IP-Adapters of SD 1.x and SDXL; use one of these"


def textual_inversion(alias: str, tensors: Mapping[str, Shape]) -> Classification | None:
    """Return the family of a textual inversion; None for other files, CheckpointError for one that does not run."""
    if not all(0 < len(shape) <= 2 for shape in tensors.values()):
        return None
    names = tensors.keys() & _ENCODERS
    for name, width in (("clip_l", 768), ("clip_g", 1280)):
        if name in tensors and (0 in tensors[name] or tensors[name][-1] not in (*range(1, TINY + 1), width)):
            what = f"a textual inversion whose {name} has shape {list(tensors[name])}, not {width} columns"
            raise unsupported(alias, what, "fetch it again, or use another one")
    if names == {"clip_l", "clip_g"}:
        return Classification(kind="textual-inversion", family="sdxl")
    if names and names != {"clip_l"}:
        models = "SD3" if {"clip_l", "clip_g"} <= names else "Flux" if "clip_l" in names else "a second text encoder"
        raise unsupported(alias, f"a textual inversion for {models} ({', '.join(sorted(names))})", _EMBEDDINGS)
    if len(tensors) > 1 and all(re.fullmatch(r"<.+>", name) for name in tensors):
        raise unsupported(alias, f"a textual inversion of {len(tensors)} words", "save each word in a file of its own")
    if len(tensors) != 1 or f".{next(iter(tensors))}".endswith(_NO_TOKEN) or 0 in next(iter(tensors.values())):
        return None
    width = next(iter(tensors.values()))[-1]
    if width > TINY and width not in (768, 1024):
        raise unsupported(alias, f"a textual inversion of width {width}", _EMBEDDINGS)
    return Classification(kind="textual-inversion", family="sd2" if width == 1024 else "sd1")


_EMBEDDINGS = "supported are those of SD 1.x, SD 2.x and SDXL (with clip_l and clip_g); use one of these"
