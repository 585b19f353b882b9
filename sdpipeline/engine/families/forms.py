"""Forms in which people have the weights of each family: a column of the documentation's table."""

from __future__ import annotations

from collections.abc import Mapping

FOLDER = "folder"
HALF = "fp16 folder"
SHARDS = "shards"
ONE_FILE = "one file"
NO_T5 = "folder without T5"
UNION = "union"

FOLDERS = (FOLDER, HALF, SHARDS)
CONVERTED = (*FOLDERS, ONE_FILE)

CHECKPOINTS: Mapping[str, tuple[str, ...]] = {
    "sd1": CONVERTED,
    "sd2": CONVERTED,
    "sd-inpaint": CONVERTED,
    "sdxl": CONVERTED,
    "sdxl-inpaint": CONVERTED,
    "sd3": (*CONVERTED, NO_T5),
    "flux": CONVERTED,
    "upscale": FOLDERS,
    "latent-upscale": FOLDERS,
    "gan-upscale": (ONE_FILE,),
}
"""Forms of a checkpoint by family. ``shards`` are those of the network that runs once per step."""

CONTROLNETS: Mapping[str, tuple[str, ...]] = {
    "sd1": (FOLDER, ONE_FILE),
    "sd2": (FOLDER, ONE_FILE),
    "sd-inpaint": (FOLDER, ONE_FILE),
    "sdxl": (FOLDER, ONE_FILE, UNION),
    "sdxl-inpaint": (FOLDER, ONE_FILE),
    "sd3": (FOLDER,),
    "flux": (FOLDER, UNION),
}
"""Forms of the ControlNets that a family takes."""


def forms(family: str, *, controlled: bool) -> str:
    """Return the forms of a family's weights as the documentation shows them, with those of its ControlNets."""
    text = ", ".join(CHECKPOINTS[family])
    return f"{text}; ControlNet: {', '.join(CONTROLNETS[family])}" if controlled else text
