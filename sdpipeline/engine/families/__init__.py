"""Model families, one module each: their pipelines by task and number of ControlNets, without torch."""

from sdpipeline.engine.families.family import Cell, Family, TextEncoding
from sdpipeline.engine.families.refusals import (
    profile_refusal,
    prompt_syntax_refusal,
    scheduler_refusal,
    size_refusal,
    strength_refusal,
    task_refusal,
)
from sdpipeline.engine.families.registry import FAMILIES, family, table
from sdpipeline.engine.families.schedulers import ETA, FEW_STEPS, SCHEDULERS

__all__ = [
    "ETA",
    "FAMILIES",
    "FEW_STEPS",
    "SCHEDULERS",
    "Cell",
    "Family",
    "TextEncoding",
    "family",
    "profile_refusal",
    "prompt_syntax_refusal",
    "scheduler_refusal",
    "size_refusal",
    "strength_refusal",
    "table",
    "task_refusal",
]
