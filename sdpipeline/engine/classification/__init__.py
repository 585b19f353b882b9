"""Kind and family of weights, from tensor names, shapes and configurations; a file's name is never read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sdpipeline.engine.classification.classification import Classification
from sdpipeline.engine.classification.components import ANNOTATORS, SAFETY_CHECKER, classify_component
from sdpipeline.engine.classification.headers import Header, header, read_header, read_json
from sdpipeline.engine.classification.loras import LoraFormat, lora_format
from sdpipeline.engine.classification.pipelines import check_pipeline_class, classify_pipeline
from sdpipeline.engine.classification.single_files import is_adapter
from sdpipeline.engine.classification.tensors import classify_single_file, classify_tensors
from sdpipeline.engine.classification.unions import network_tensors, union_family
from sdpipeline.engine.weight_files import INDEX, WEIGHTS
from sdpipeline.errors import CheckpointError

__all__ = [
    "ANNOTATORS",
    "SAFETY_CHECKER",
    "Classification",
    "Header",
    "LoraFormat",
    "check_pipeline_class",
    "classify",
    "classify_single_file",
    "header",
    "is_adapter",
    "lora_format",
    "read_header",
    "read_json",
]


def classify(alias: str, directory: Path, names: Sequence[str]) -> Classification:
    """Classify a checkpoint folder from ``names``, its relevant files; CheckpointError if nothing here runs it."""
    if INDEX in names:
        return classify_pipeline(alias, directory)
    if "config.json" in names:
        found = classify_component(alias, read_json(alias, directory / "config.json"))
        union = union_family(network_tensors(alias, directory, names)) if found.kind == "controlnet" else None
        return replace(found, family=union) if union else found
    weights = [name for name in names if name.endswith(WEIGHTS) and "/" not in name]
    if len(weights) == 1:
        return classify_tensors(alias, directory / weights[0])
    if weights:
        raise CheckpointError(
            f"checkpoint {alias!r}: its folder holds {len(weights)} {WEIGHTS} files (as {weights[0]} and {weights[1]}) "
            "and no model_index.json or config.json; one folder is one checkpoint: give each file a folder, or add a "
            "folder of LoRAs with `sdpipeline checkpoints add --all DIR`"
        )
    raise CheckpointError(
        f"checkpoint {alias!r}: its folder has no model_index.json, config.json or {WEIGHTS} file at its top; "
        "name the folder that holds one of these"
    )
