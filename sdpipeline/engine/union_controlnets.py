"""Union ControlNets: one network for several kinds of control map, of which ``control_mode`` selects one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from sdpipeline.engine.classification.unions import FLUX_UNION, SDXL_UNION, network_tensors, union_modes
from sdpipeline.engine.refusal import Refusal

if TYPE_CHECKING:
    from sdpipeline.engine.checkpoints import CheckpointFiles

MODES: Mapping[str, Mapping[str, int]] = {
    # Published order of xinsir/controlnet-union-sdxl-1.0 (modes 0-5) and its ProMax edition (0-7).
    SDXL_UNION: {
        "pose": 0,
        "depth": 1,
        "softedge": 2,
        "scribble": 2,
        "canny": 3,
        "lineart": 3,
        "mlsd": 3,
        "normal": 4,
        "segmentation": 5,
        "tile": 6,
        "inpaint": 7,
    },
    # Published order of InstantX/FLUX.1-dev-Controlnet-Union and Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro.
    FLUX_UNION: {"canny": 0, "tile": 1, "depth": 2, "blur": 3, "pose": 4, "gray": 5, "low-quality": 6},
}
"""Names of the modes by family of the union ControlNet. A union of another order takes numbers."""

OTHER_NAMES: Mapping[str, str] = {
    "openpose": "pose",
    "hed": "softedge",
    "pidi": "softedge",
    "ted": "softedge",
    "anime-lineart": "lineart",
    "seg": "segmentation",
    "segment": "segmentation",
    "repaint": "inpaint",
    "grey": "gray",
    "lq": "low-quality",
}
"""Other names that model cards and user interfaces use for a mode."""

MOST_MODES = 64
"""Upper bound of a mode's number, for a union whose files are on another machine."""


def is_union(family: str) -> bool:
    """Return True for the family of a union ControlNet."""
    return family in MODES


def uses_union(controlnets: Iterable[CheckpointFiles | None]) -> bool:
    """Return True if any of these is a union ControlNet."""
    return any(files is not None and is_union(files.family) for files in controlnets)


def mode_number(family: str, mode: int | str) -> int:
    """Return the number of a mode by its name; ValueError with the known names for an unknown one."""
    if isinstance(mode, int):
        return mode
    name = mode.strip().lower().replace("_", "-").replace(" ", "-")
    name = OTHER_NAMES.get(name, name)
    if name in MODES[family]:
        return MODES[family][name]
    if name.isdigit():
        return int(name)
    raise ValueError(f"no control mode {mode!r}")


def known_modes(files: CheckpointFiles) -> str:
    """Return the modes of a union ControlNet in words, such as ``canny (0), tile (1)``."""
    count = mode_count(files) or MOST_MODES
    named = {name: number for name, number in MODES[files.family].items() if number < count}
    return ", ".join(f"{name} ({number})" for name, number in named.items())


def mode_refusal(n: int, files: CheckpointFiles, mode: int | str | None) -> Refusal | None:
    """Refuse a mode that is missing on a union, unknown to it, or given for an ordinary ControlNet."""
    key = f"controlnets.{n}.control_mode"
    if not is_union(files.family):
        message = f"{files.alias!r} is not a union ControlNet and has no modes"
        return None if mode is None else Refusal(key=key, message=message, fix="remove it")
    if mode is None:
        message = f"{files.alias!r} is a union ControlNet and needs it"
        return Refusal(key=key, message=message, fix=f"write one of {known_modes(files)}")
    try:
        number = mode_number(files.family, mode)
    except ValueError as error:
        return Refusal(key=key, message=str(error), fix=f"write one of {known_modes(files)}")
    count = mode_count(files)
    if not 0 <= number < (count or MOST_MODES):
        message = f"{number} is not a mode of {files.alias!r}" + (f", which has {count}" if count else "")
        return Refusal(key=key, message=message, fix=f"write one of {known_modes(files)}")
    return None


def combination_refusal(controlnets: Sequence[CheckpointFiles], modes: Sequence[int | str | None]) -> Refusal | None:
    """Refuse a set of ControlNets that no pipeline of diffusers applies together.

    The SDXL pipelines take one union with several modes, or several unions with one mode each, and no ordinary
    ControlNet in addition. ``modes`` are in the order of ``controlnets``.
    """
    unions = [files for files in controlnets if files.family == SDXL_UNION]
    if not unions:
        return None
    others = [files.alias for files in controlnets if files.family != SDXL_UNION]
    if others:
        message = f"{unions[0].alias!r} is a union ControlNet and does not run together with {others[0]!r}"
        return Refusal(key="controlnets", message=message, fix="use unions only, or ordinary ControlNets only")
    digests = {files.digest for files in unions}
    if len(digests) == 1 and len(set(modes)) < len(unions):
        message = f"{unions[0].alias!r} is used twice with the same control_mode"
        return Refusal(key="controlnets", message=message, fix="give each use another control_mode")
    if 1 < len(digests) < len(unions):
        message = "several modes of one union ControlNet do not run together with another union"
        return Refusal(key="controlnets", message=message, fix="use one union with several modes, or each union once")
    return None


def mode_count(files: CheckpointFiles) -> int | None:
    """Return the number of modes of a union ControlNet; None if its files are on another machine."""
    here = [name for name in files.manifest if (files.directory / name).is_file()]
    return union_modes(network_tensors(files.alias, files.directory, here))
