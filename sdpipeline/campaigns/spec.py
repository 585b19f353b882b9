"""Pydantic models of the campaign file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from sdpipeline.campaigns.parameters import Parameters
from sdpipeline.campaigns.seeds import SeedRange, Seeds
from sdpipeline.campaigns.spec_part import LARGEST_SIDE, NAME, Name, Scalar, SpecPart, Variable
from sdpipeline.campaigns.stage_spec import OutputSpec, Quality, Stage
from sdpipeline.domain import Profile, PromptSyntax, Reproducibility

Choice = Annotated[dict[Variable, Scalar], Field(json_schema_extra={"minProperties": 1})]


class Rows(SpecPart):
    """A table whose rows are values, or a folder's files as rows: one job chain per row."""

    file: str | None = None
    """A table next to this file or in a bucket, read as a stream."""
    files: str | None = None
    """Pictures next to this file, one a row, as in `pictures/*.png`, instead of a table."""
    key: str | None = None
    """Title of the column that identifies a row permanently; without it the content identifies a row."""
    columns: dict[Variable, str] | None = None
    """Variables with the titles of their columns; without it every column is a variable, named in lower case."""


class Budget(SpecPart):
    """Limits at which a campaign pauses itself."""

    max_gpu_seconds: Annotated[float, Field(gt=0)] | None = None
    """Device seconds, failed attempts included."""
    max_images: Annotated[int, Field(ge=1, le=2**53 - 1)] | None = None
    """Number of pictures, of any stage."""
    max_cost: Annotated[float, Field(gt=0)] | None = None
    """Cost in the currency of SDP_COST_PER_GPU_HOUR."""


class Schedule(SpecPart):
    """Cron schedule of a campaign, run as the same campaign or as a new edition each time."""

    cron: str
    """Minute, hour, day of month, month and day of week, as in "0 3 * * *"."""
    timezone: str = "UTC"
    """Time zone of the cron expression, as in Europe/Berlin."""
    mode: Literal["incremental", "edition"] = "incremental"
    """`incremental` generates new and changed jobs; `edition` generates all again, with the date as `{{ edition }}`."""
    on_overlap: Literal["skip", "queue"] = "skip"
    """`skip` or `queue` an edition that is due while an older one is unfinished."""


class Provenance(SpecPart):
    """Content of the provenance record in a picture; every picture is marked as AI-made and signed."""

    include_prompt: Literal["full", "hash", "none"] = "full"
    """Prompts in the file: `full`, as their SHA-256 (`hash`), or `none`; the sidecar always has them."""


class Policy(SpecPart):
    """Restrictions on checkpoints, sizes and prompts."""

    checkpoints: list[str] | None = None
    """Aliases that stages may name, including ControlNets, adapters and annotators."""
    licences: list[Annotated[str, Field(min_length=1, max_length=200)]] | None = None
    """Licences that weights may be registered under."""
    purposes: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(default_factory=list)
    """Purposes of the pictures; weights must be approved for each of them."""
    safety_checker: Annotated[str, Field(pattern=NAME)] | None = None
    """Alias of the safety checker that every finished picture must pass."""
    max_width: Annotated[int, Field(ge=8, le=LARGEST_SIDE)] | None = None
    """Maximum width of a finished picture, in pixels."""
    max_height: Annotated[int, Field(ge=8, le=LARGEST_SIDE)] | None = None
    """Maximum height of a finished picture, in pixels."""
    deny: list[Annotated[str, Field(min_length=1, max_length=1000)]] = Field(default_factory=list)
    """Words and phrases that no prompt may contain after its variables are filled in."""
    allow: list[Annotated[str, Field(min_length=1, max_length=1000)]] = Field(default_factory=list)
    """Phrases inside which a denied word is allowed."""


class CampaignSpec(SpecPart):
    """A whole campaign file."""

    name: Name
    """Lower-case letters, digits and `-`; the same name again is the next version of the campaign."""
    checkpoint: str
    """Alias of the weights; a stage may override it."""
    priority: Annotated[int, Field(ge=0, le=1000)] = 100
    """Lower runs first."""
    budget: Budget = Budget()
    """Limits at which the campaign pauses itself."""
    schedule: Schedule | None = None
    """Cron schedule of the campaign."""
    subject: Annotated[str, Field(min_length=1)] | None = None
    """Data subject of a job, as a template; `erase --subject` finds jobs by it."""
    reuse: bool = True
    """Copy a picture that exists already instead of generating it again."""
    policy: Policy = Policy()
    """Restrictions on checkpoints, sizes and prompts."""
    variables: dict[Variable, Any] = Field(default_factory=dict)
    """Lists of values by name, multiplied; `zip:` lists that advance together; `rows:` a table."""
    exclude: list[Choice] = Field(default_factory=list)
    """Combinations to leave out."""
    include: list[Choice] = Field(default_factory=list)
    """Combinations to add to the product of the lists."""
    seeds: Seeds = SeedRange()
    """Root seeds, as a range or a list: one chain of pictures for each."""
    defaults: Parameters = Parameters()
    """Default parameters for every stage whose task takes them."""
    stages: Annotated[list[Stage], Field(min_length=1, max_length=64)]
    """The steps of the chain: each makes one picture per row, combination and seed."""
    reproducibility: Reproducibility = "tolerant"
    """How exactly pictures must be reproducible."""
    profile: Profile | None = None
    """Speed profile; default `exact`, which trades nothing for speed."""
    prompt_syntax: PromptSyntax = "plain"
    """Syntax of prompts: `weighted` reads `(word:1.3)`, `[word]` and `BREAK`; `plain` reads them as text."""
    quality: Quality = Quality()
    """Minimum quality scores of every picture."""
    output: OutputSpec = OutputSpec()
    """Encoding of pictures."""
    provenance: Provenance = Provenance()
    """Content of the provenance record in a picture."""
