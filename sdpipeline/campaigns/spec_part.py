"""Base model and value types of the campaign file."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]{0,62}$"
LARGEST_SIDE = 8192

Name = Annotated[str, Field(pattern=NAME)]
Variable = Annotated[str, Field(pattern=VARIABLE)]
Scalar = bool | int | float | str
Number = float | str
Integer = int | str


class SpecPart(BaseModel):
    """Base of the models of a campaign file."""

    # Strict, so that `true` is not read as 1, nor "4" as 4.
    # The docstring below a key is its description, in editors too.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
