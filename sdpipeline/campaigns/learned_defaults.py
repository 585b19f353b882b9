"""Defaults of generation parameters that a stage takes from its checkpoint and LoRAs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdpipeline.engine.checkpoints import CheckpointFiles, native_size
from sdpipeline.engine.distilled import detected_defaults, embeds_guidance, fitting, trails
from sdpipeline.engine.families import Family

OF_FAMILY = frozenset({"num_inference_steps", "guidance_scale", "scheduler"})
"""Parameters for which every family has a default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedDefaults:
    """Defaults by diffusers' names: of the first LoRA that has one, else of the checkpoint.

    ``native_area`` is the area in pixels of the pictures that the checkpoint was made for, None if unknown.
    ``expected`` are the values that parameters are compared with for warnings: the defaults, and those that the
    configurations of a checkpoint show that an earlier release registered without any. ``owners`` names the weights
    that each of them comes from. ``embedded_guidance`` is True if the U-Net takes its guidance scale as an embedding,
    so that a negative prompt has no effect, ``trails`` if the checkpoint's own scheduler has trailing timesteps.
    """

    row: Family
    files: CheckpointFiles
    values: Mapping[str, Any]
    expected: Mapping[str, Any]
    owners: Mapping[str, str]
    embedded_guidance: bool
    trails: bool
    native_area: int | None

    def get(self, name: str) -> Any:
        """Return the default of a parameter: of the weights, else of their family; None if neither has one."""
        return self.values[name] if name in self.values else getattr(self.row, name) if name in OF_FAMILY else None

    def size(self, otherwise: int) -> tuple[int, int]:
        """Return the default width and height, pixels; ``otherwise`` is the side if the weights have none."""
        side, multiple = self.files.native_size, self.row.size_multiple
        side = otherwise if side is None else max(multiple, side // multiple * multiple)
        return self.values.get("width", side), self.values.get("height", side)


def learned_defaults(row: Family, files: CheckpointFiles, loras: Sequence[CheckpointFiles] = ()) -> LearnedDefaults:
    """Collect the defaults of a stage's checkpoint and LoRAs, as far as this family takes them."""
    unknown = files.native_size is None and not files.defaults
    expected = dict(detected_defaults(files.directory, files.kind, files.family)) if unknown else {}
    owners = dict.fromkeys(expected, files.alias)
    values: dict[str, Any] = {}
    for each in (files, *reversed(loras)):
        own = fitting(each.defaults, row)
        values |= own
        owners |= dict.fromkeys(own, each.alias)
    return LearnedDefaults(
        row=row,
        files=files,
        values=values,
        expected=expected | values,
        owners=owners,
        embedded_guidance=embeds_guidance(files.directory, row),
        trails=trails(files.directory),
        native_area=_native_area(files, values, shown=unknown),
    )


def _native_area(files: CheckpointFiles, values: Mapping[str, Any], *, shown: bool) -> int | None:
    """Return the area of the default size, else of the native one; ``shown`` allows that of the configurations."""
    if {"width", "height"} <= values.keys():
        return int(values["width"] * values["height"])
    side = native_size(files.alias, files.directory) if shown else files.native_size
    return None if side is None else side**2
