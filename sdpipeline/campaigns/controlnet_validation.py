"""Validation of a stage's ControlNets against its checkpoint, and of the modes of union ControlNets."""

from __future__ import annotations

from sdpipeline.campaigns.stage_plan import Catalog
from sdpipeline.campaigns.stage_spec import Stage
from sdpipeline.campaigns.yaml_source import Faults, KeyPath
from sdpipeline.engine.checkpoints import CheckpointFiles, controlnet_refusal
from sdpipeline.engine.union_controlnets import combination_refusal, mode_refusal


def check_fit(stage: Stage, path: KeyPath, faults: Faults, catalog: Catalog, *, base: CheckpointFiles) -> None:
    """Note ControlNets that do not fit the stage's checkpoint, their mode, or each other."""
    found = [catalog.get(use.checkpoint) for use in stage.controlnets]
    controlnets = [files for files in found if files is not None and files.kind == "controlnet"]
    sound = len(controlnets) == len(stage.controlnets)
    for n, (use, files) in enumerate(zip(stage.controlnets, found, strict=True)):
        if files is None or files.kind != "controlnet":
            continue
        place: KeyPath = (*path, "controlnets", n)
        if refused := controlnet_refusal(stage.task, base, files):
            faults.add((*place, "checkpoint"), refused.message, refused.fix)
            sound = False
        elif refused := mode_refusal(n, files, use.control_mode):
            faults.add((*place, "control_mode"), refused.message, refused.fix)
            sound = False
    modes = [use.control_mode for use in stage.controlnets]
    if sound and (refused := combination_refusal(controlnets, modes)):
        faults.add((*path, "controlnets"), refused.message, refused.fix)
