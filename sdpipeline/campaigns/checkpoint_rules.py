"""Rules of a stage that its checkpoint's own configuration files make, if they are on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdpipeline.domain import Profile, Task
from sdpipeline.engine import config_checks
from sdpipeline.engine.checkpoint_config import Config, own_scheduler, read
from sdpipeline.engine.checkpoints import CheckpointFiles
from sdpipeline.engine.families import Family, scheduler_config
from sdpipeline.engine.refusal import Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRules:
    """Rules of one stage; ``parts`` is a refusal that does not depend on the values of a combination."""

    directory: Path
    row: Family
    controlnets: int
    scheduler: Config
    parts: Refusal | None

    def refusal(self, scheduler: str, num_inference_steps: int, width: int, height: int) -> Refusal | None:
        """Refuse values that this checkpoint cannot do."""
        return (
            self.parts
            or scheduler_config.refusal(
                self.row, self.scheduler, scheduler, num_inference_steps, controlnets=self.controlnets
            )
            or config_checks.size_refusal(self.directory, self.row, width, height)
        )


def rules_of(
    files: CheckpointFiles,
    row: Family,
    task: Task,
    profile: Profile,
    *,
    vae: CheckpointFiles | None,
    controlnets: Sequence[CheckpointFiles],
) -> CheckpointRules:
    """Read the configurations of a checkpoint, of the autoencoder that replaces its own, and of its ControlNets."""
    pooled = config_checks.pooled_refusal([each.directory for each in controlnets], profile)
    return CheckpointRules(
        directory=files.directory,
        row=row,
        controlnets=len(controlnets),
        scheduler=own_scheduler(files.directory),
        parts=config_checks.refusal(files.directory, row, task) or _vae_refusal(vae, row, task) or pooled,
    )


def _vae_refusal(vae: CheckpointFiles | None, row: Family, task: Task) -> Refusal | None:
    if vae is None:
        return None
    refused = config_checks.vae_refusal(read(vae.directory, "config.json"), row, task, "its config.json")
    return Refusal(key="vae", message=refused.message, fix=refused.fix) if refused else None
