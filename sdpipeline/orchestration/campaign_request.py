"""Request to the deployed campaign flow, by a person or a schedule; the form in the Prefect UI."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

EDITION_NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
CAMPAIGN_NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
SOURCES = ("campaign", "file", "text")
NEEDS_SOURCE = ("reopen", "min_workers", "max_workers")


class Reopen(StrEnum):
    """Status of the unsuccessful jobs that are tried again."""

    NOTHING = "nothing"
    FAILED = "failed"
    BLOCKED = "blocked"
    CANCELLED = "cancelled"


class CampaignRequest(BaseModel):
    """Name of a submitted campaign, or a campaign file; with neither, every campaign with work left."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    campaign: Annotated[str, Field(pattern=CAMPAIGN_NAME)] | None = Field(
        None, title="Campaign", description="name of a submitted campaign: continue it"
    )
    file: Annotated[str, Field(pattern=r"^s3://[^/]+/.+$", max_length=1100)] | None = Field(
        None, title="Campaign file", description="s3://bucket/key.yaml within SDP_INPUTS__ALLOWED: submit it and run it"
    )
    text: Annotated[str, Field(max_length=1_000_000)] | None = Field(
        None, title="Campaign text", description="YAML of a campaign file: submit it and run it"
    )
    prune: bool = Field(
        False, title="Prune", description="cancel jobs that the campaign file or text no longer asks for", strict=True
    )
    edition: Annotated[str, Field(pattern=EDITION_NAME)] | None = Field(
        None,
        title="Edition",
        description="generate all pictures again under this name; default: the edition of its schedule",
    )
    reopen: Reopen = Field(Reopen.NOTHING, title="Try again", description="reopen jobs with this status first")
    min_workers: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, title="Minimum workers", description="default SDP_DISPATCH__MIN_WORKERS"
    )
    max_workers: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, title="Maximum workers", description="default SDP_DISPATCH__MAX_WORKERS"
    )

    @model_validator(mode="after")
    def _one_of_three(self) -> CampaignRequest:
        named = [name for name in SOURCES if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"give only one of {' and '.join(named)}")
        if self.prune and self.file is None and self.text is None:
            raise ValueError("prune needs file or text: the name of a submitted campaign changes no jobs")
        if self.edition is not None and self.file is None and self.text is None:
            raise ValueError("edition needs file or text: a submitted campaign already has its editions")
        if not named and (asked := [name for name in NEEDS_SOURCE if name in self.document()]):
            raise ValueError(f"{' and '.join(asked)}: needs one of campaign, file and text")
        if self.min_workers is not None and self.max_workers is not None and self.min_workers > self.max_workers:
            raise ValueError("min_workers is more than max_workers")
        return self

    def __str__(self) -> str:
        """Return the run's name until the campaign is known."""
        if self.campaign or self.file:
            return str(self.campaign or self.file)
        return "a campaign's text" if self.text else "all campaigns"

    def document(self) -> dict[str, Any]:
        """Return the flow's parameter, with only the values that differ from the defaults."""
        return self.model_dump(mode="json", exclude_defaults=True)


EVERYTHING = CampaignRequest()
