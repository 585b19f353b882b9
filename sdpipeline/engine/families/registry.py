"""Table of model families."""

from __future__ import annotations

from collections.abc import Mapping

from sdpipeline.domain import Task
from sdpipeline.engine.families import (
    flux,
    gan_upscale,
    latent_upscale,
    sd1,
    sd2,
    sd3,
    sd_inpaint,
    sdxl,
    sdxl_inpaint,
    upscale,
)
from sdpipeline.engine.families.family import Cell, Family
from sdpipeline.engine.families.forms import forms

FAMILIES: Mapping[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (sd1, sd2, sd_inpaint, sdxl, sdxl_inpaint, sd3, flux, upscale, latent_upscale, gan_upscale)
}
"""Families by name, in the order of the documentation. A new family is a module with ``FAMILY``, named here."""


def family(name: str) -> Family:
    """Return the row of that name; KeyError for a name that ``task_refusal`` would refuse."""
    return FAMILIES[name]


def table() -> str:
    """Return the whole table as Markdown, for the documentation."""
    lines = ["| family | task | plain | with ControlNets | as people have it |", "|---|---|---|---|---|"]
    for row in FAMILIES.values():
        for task in Task:
            plain, controlled = row.cell(task), row.controlled.get(task)
            if plain or controlled:
                cells = (f"{row.title} (`{row.name}`)", task, _named(plain), _named(controlled))
                lines.append(f"| {' | '.join(cells)} | {forms(row.name, controlled=controlled is not None)} |")
    return "\n".join(lines)


def _named(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    return f"{cell.pipeline} (one)" if cell.max_controlnets == 1 else cell.pipeline
