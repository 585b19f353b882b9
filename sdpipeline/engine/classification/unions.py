"""Recognition of union ControlNets by their tensors: published configurations name an ordinary class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sdpipeline.engine.classification.headers import header

SDXL_UNION = "sdxl-union"
FLUX_UNION = "flux-union"

_MODES = {"task_embedding": SDXL_UNION, "controlnet_mode_embedder.weight": FLUX_UNION}
"""Tensor with one row per control mode, and the family of the union ControlNet that has it."""


def union_family(tensors: Mapping[str, Sequence[int]]) -> str | None:
    """Return the family of a union ControlNet by its tensors' shapes; None for an ordinary ControlNet."""
    return next((family for name, family in _MODES.items() if name in tensors), None)


def union_modes(tensors: Mapping[str, Sequence[int]]) -> int | None:
    """Return the number of control modes of a union ControlNet; None for an ordinary one."""
    return next((tensors[name][0] for name in _MODES if tensors.get(name)), None)


def network_tensors(alias: str, directory: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Return the tensors' names and shapes of a network's weight files, all shards together."""
    tensors: dict[str, list[int]] = {}
    for name in names:
        if name.endswith(".safetensors") and "/" not in name:
            tensors |= header(alias, directory / name)
    return tensors
