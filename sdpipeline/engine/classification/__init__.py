"""Kind and family of weights, from tensor names, shapes and configurations; a file's name is never read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdpipeline.engine.classification.classification import Classification
from sdpipeline.engine.classification.components import ANNOTATORS, SAFETY_CHECKER, classify_component
from sdpipeline.engine.classification.headers import header, read_json
from sdpipeline.engine.classification.pipelines import classify_pipeline
from sdpipeline.engine.classification.tensors import classify_tensors
from sdpipeline.errors import CheckpointError

__all__ = ["ANNOTATORS", "SAFETY_CHECKER", "Classification", "classify", "header", "read_json"]

WEIGHTS = ".safetensors"


def classify(alias: str, directory: Path, names: Sequence[str]) -> Classification:
    """Classify a checkpoint folder from ``names``, its relevant files; CheckpointError if nothing here runs it."""
    if "model_index.json" in names:
        return classify_pipeline(alias, directory)
    if "config.json" in names:
        return classify_component(alias, read_json(alias, directory / "config.json"))
    weights = [name for name in names if name.endswith(WEIGHTS) and "/" not in name]
    if len(weights) != 1:
        raise CheckpointError(
            f"checkpoint {alias!r}: expected model_index.json, config.json or exactly one {WEIGHTS} file"
        )
    return classify_tensors(alias, directory / weights[0])
