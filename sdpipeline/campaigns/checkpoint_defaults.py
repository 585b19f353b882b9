"""Defaults of generation parameters that people give with a checkpoint or LoRA: ``checkpoints add --defaults``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdpipeline.campaigns.stage_plan import WrongValueError, checked
from sdpipeline.engine.checkpoints import CheckpointFiles
from sdpipeline.engine.distilled import PRESETS, Defaults, fitting
from sdpipeline.engine.families import FAMILIES, SCHEDULERS, Family
from sdpipeline.errors import BadInputError, Mistake
from sdpipeline.suggestions import nearest

AUTO = "auto"
"""Detect the defaults again, instead of keeping those of an earlier registration."""
NONE = "none"
"""Use the defaults of the family, whatever the configurations show."""

OF_A_LORA = ("num_inference_steps", "guidance_scale", "scheduler", "clip_skip")
OF_A_CHECKPOINT = ("width", "height", *OF_A_LORA)

_MEANT = {
    "steps": "num_inference_steps",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "guidance": "guidance_scale",
    "sampler": "scheduler",
    "sampler_name": "scheduler",
    "native_size": "width",
    "resolution": "width",
}
"""Names that other programs use."""


def parsed_defaults(given: Sequence[str], files: CheckpointFiles) -> Defaults:
    """Parse ``KEY=VALUE`` and names of presets, the later over the earlier; they are validated as in a campaign file.

    ``auto`` stands for the detected defaults, ``files.defaults``, and ``none`` for no defaults. Raises BadInputError
    with every mistake, each naming its key.
    """
    row = FAMILIES.get(files.family)
    if not (files.kind == "lora" or (files.kind == "checkpoint" and row and row.text != "none")):
        what = row.title if row else files.kind
        raise BadInputError(_mistake(f"{files.alias!r} is a {what}, which takes no parameters", "leave it out"))
    found: dict[str, Any] = {}
    mistakes: list[Mistake] = []
    for text in given:
        name, sign, value = (part.strip() for part in text.partition("="))
        if not sign and name in (*PRESETS, AUTO, NONE):
            own = PRESETS.get(name, files.defaults if name == AUTO else {})
            found |= fitting(own, row) if row else own
            continue
        try:
            found[name] = _value(name, value, files, row) if sign else _no_preset(name)
        except WrongValueError as wrong:
            mistakes.append(_mistake(f"{name}: {wrong}" if sign else str(wrong), wrong.fix))
    if mistakes:
        raise BadInputError(*mistakes)
    return found


def _value(name: str, value: str, files: CheckpointFiles, row: Family | None) -> Any:
    known = OF_A_LORA if files.kind == "lora" else OF_A_CHECKPOINT
    if name not in known:
        meant = _MEANT.get(name.lower().replace("-", "_"))
        fix = f"did you mean {meant!r}?" if meant else nearest(name, known)
        raise WrongValueError((), f"a {files.kind} has no default for it", fix)
    if name == "scheduler" and value not in SCHEDULERS:
        raise WrongValueError((), f"no scheduler {value!r}", nearest(value, row.schedulers if row else SCHEDULERS))
    if name == "clip_skip" and row and not row.clip_skip:
        raise WrongValueError((), f"{row.title} does not take it", "leave it out")
    # A LoRA that fits several families is checked against each when a stage uses it.
    return checked(name, value, row or FAMILIES["sd1"])


def _no_preset(name: str) -> Any:
    fix = f"write KEY=VALUE, or one of {', '.join((*PRESETS, AUTO, NONE))}"
    raise WrongValueError((), f"no defaults named {name!r}", fix)


def _mistake(message: str, fix: str | None) -> Mistake:
    return Mistake(message=f"--defaults {message}", fix=fix)
