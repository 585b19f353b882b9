"""Seeds of a campaign or a stage: a range or a list."""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Field, Tag

from sdpipeline.campaigns.spec_part import SpecPart

MAX_SEEDS = 1_000_000
LARGEST_SEED = 2**63 - 1

Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]


class SeedRange(SpecPart):
    """A range of ``count`` seeds from ``start`` on."""

    start: Seed = 0
    """The first seed."""
    count: Annotated[int, Field(ge=1, le=MAX_SEEDS)] = 1
    """Number of seeds; each gives one picture per row and combination."""


Seeds = Annotated[
    Annotated[SeedRange, Tag("range")] | Annotated[list[Seed], Field(min_length=1, max_length=MAX_SEEDS), Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list) else "range"),
]


def seed_count(seeds: SeedRange | list[int]) -> int:
    """Return the number of seeds."""
    return seeds.count if isinstance(seeds, SeedRange) else len(seeds)
