"""Scheduler configuration of a single file: what it says of itself, else its folder's, else the published one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdpipeline.engine.single_files.layout import Layout
from sdpipeline.engine.single_files.source_file import SourceFile
from sdpipeline.engine.single_files.templates import published, read_config
from sdpipeline.errors import CheckpointError

PREDICTION_TYPES = ("epsilon", "v_prediction")


def scheduler(
    source: SourceFile, layout: Layout, related: Sequence[Path], prediction_type: str | None
) -> dict[str, Any]:
    """Return the scheduler's configuration; CheckpointError if the prediction type of an SD 2 cannot be known.

    Order: the user's option, marker tensors and ``modelspec`` metadata of the file, scheduler of a folder with
    the same architecture (``related``), published configuration.
    """
    family = layout.family
    config = _of_folders(related)
    if family in ("sd3", "flux"):
        if prediction_type is not None:
            raise CheckpointError(f"{source.path} holds {family} weights, which predict a flow; omit --prediction-type")
        schnell = family == "flux" and not any("guidance_in." in name for name in source.tensors)
        return config or dict(published(family)["scheduler_schnell" if schnell else "scheduler"])
    found = prediction_type or _stated(source)
    if found is None and config is None and family == "sd2" and _channels(layout) == 4:
        raise CheckpointError(
            f"{source.path} holds SD 2 weights, and neither its tensors nor its metadata tell their prediction type; "
            "say --prediction-type epsilon (the 512-pixel base) or --prediction-type v_prediction (768 pixels)"
        )
    config = config or dict(published(family)["scheduler"])
    if found is not None:
        config["prediction_type"] = found
    if found == "v_prediction" and "ztsnr" in source.tensors:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def _channels(layout: Layout) -> int:
    shapes = layout.parts["unet"].shapes
    return next((shapes[name][1] for name in ("input_blocks.0.0.weight", "conv_in.weight") if name in shapes), 4)


def _stated(source: SourceFile) -> str | None:
    """Return the prediction type that the file states: a marker tensor ``v_pred``, or ``modelspec`` metadata."""
    if "v_pred" in source.tensors:
        return "v_prediction"
    said = source.metadata.get("modelspec.prediction_type", "").strip().lower()
    return {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}.get(said)


def _of_folders(related: Sequence[Path]) -> dict[str, Any] | None:
    for root in related:
        config = read_config(root / "scheduler" / "scheduler_config.json")
        if config and "_class_name" in config:
            return {key: value for key, value in config.items() if key != "_diffusers_version"}
    return None
