"""Classification of one safetensors file without a configuration."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from sdpipeline.engine.classification.adapters import ip_adapter, textual_inversion
from sdpipeline.engine.classification.classification import Classification, unsupported
from sdpipeline.engine.classification.headers import read_header
from sdpipeline.engine.classification.lora_families import classify_lora
from sdpipeline.engine.classification.loras import Shape, lora_format
from sdpipeline.engine.classification.single_files import classify_checkpoint
from sdpipeline.engine.classification.upscalers import upscaler
from sdpipeline.errors import CheckpointError


def classify_tensors(alias: str, path: Path) -> Classification:
    """Classify a folder's only safetensors file; CheckpointError if nothing here loads it as it is."""
    header = read_header(alias, path)
    found = classify_single_file(alias, header.tensors, header.metadata, path=path)
    if found.layout is not None:
        names = {
            "checkpoint": f"a whole {found.family} checkpoint",
            "controlnet": "a ControlNet",
            "vae": "an autoencoder",
        }
        raise CheckpointError(
            f"checkpoint {alias!r}: {path.name} is {names[found.kind]} in one file, which has to be converted once; "
            "move it out of the folder of checkpoints and type "
            f"`sdpipeline checkpoints add {alias} {shlex.quote(path.name)}`"
        )
    return found


def classify_single_file(
    alias: str, tensors: Mapping[str, Shape], metadata: Mapping[str, str], *, path: Path | None = None
) -> Classification:
    """Classify one file by its tensors; CheckpointError if it is damaged, unknown or runs nowhere here.

    ``tensors`` are names with shapes, ``metadata`` is the header's. ``path`` lets spandrel read the small tensors of an
    upscaler. A result with a ``layout`` has to be converted before it can be registered.
    """
    if not tensors:
        raise CheckpointError(f"checkpoint {alias!r}: its file holds no tensors; fetch it again")
    adapter = ip_adapter(alias, tensors)
    if adapter is not None:
        return adapter
    quantized = next((name for name in tensors if name.endswith((".qweight", ".wscales"))), None)
    if quantized is not None:
        raise unsupported(alias, f"quantized weights ({quantized})", "use the fp16 or bf16 file of these weights")
    whole = "lora_controlnet" in tensors or any(name.startswith("lllite_") for name in tensors)
    lora = None if whole else lora_format(tensors)
    if lora is not None:
        return classify_lora(alias, tensors, lora)
    found = (
        textual_inversion(alias, tensors)
        or classify_checkpoint(alias, tensors, metadata)
        or upscaler(alias, path, tensors)
    )
    if found is None:
        raise CheckpointError(
            f"checkpoint {alias!r} is unknown: its tensors (as {min(tensors)!r}) are not those of a LoRA, an "
            "IP-Adapter, a textual inversion, an upscaler or a checkpoint that runs here; if its publisher has a "
            "folder with config.json or model_index.json, fetch that whole folder"
        )
    return found
