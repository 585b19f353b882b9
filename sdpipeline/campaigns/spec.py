"""Pydantic models of the campaign file."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from sdpipeline.campaigns.yaml_source import Faults, KeyPath
from sdpipeline.domain import Profile, Reproducibility, Task

NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]{0,62}$"
LARGEST_SIDE = 8192
MOST_SEEDS = 1_000_000
LARGEST_SEED = 2**63 - 1

Name = Annotated[str, Field(pattern=NAME)]
Variable = Annotated[str, Field(pattern=VARIABLE)]
Scalar = bool | int | float | str
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Choice = Annotated[dict[Variable, Scalar], Field(json_schema_extra={"minProperties": 1})]
Number = float | str
Integer = int | str


class _Part(BaseModel):
    # Strict, so that `true` is not read as 1, nor "4" as 4.
    # The docstring below a key is its description, in editors too.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class SeedRange(_Part):
    """A range of ``count`` seeds from ``start`` on."""

    start: Seed = 0
    """The first seed."""
    count: Annotated[int, Field(ge=1, le=MOST_SEEDS)] = 1
    """Number of seeds; each gives one picture per row and combination."""


Seeds = Annotated[
    Annotated[SeedRange, Tag("range")] | Annotated[list[Seed], Field(min_length=1, max_length=MOST_SEEDS), Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list) else "range"),
]


class Rows(_Part):
    """A table whose rows are values, or a folder's files as rows: one job chain per row."""

    file: str | None = None
    """A table next to this file or in a bucket, read as a stream."""
    files: str | None = None
    """Pictures next to this file, one a row, as in `pictures/*.png`, instead of a table."""
    key: str | None = None
    """Title of the column that identifies a row permanently; without it the content identifies a row."""
    columns: dict[Variable, str] | None = None
    """Variables with the titles of their columns; without it every column is a variable, named in lower case."""


class ImageSpec(_Part):
    """A picture from an earlier stage, from a file next to the campaign, or from a bucket."""

    stage: str | None = None
    """Id of an earlier stage; its picture of the same row, combination and seed is used."""
    file: str | None = None
    """A picture next to this file; a template."""
    url: str | None = None
    """A picture in a bucket, as in `s3://bucket/key`; a template."""


class ControlNetSpec(_Part):
    """One ControlNet and its conditioning picture."""

    checkpoint: str
    """Alias of a ControlNet."""
    image: ImageSpec
    """The conditioning picture."""
    annotator: str = "none"
    """Annotator that turns the picture into a control map; `none` uses the picture as the map."""
    annotator_parameters: dict[str, Scalar] = Field(default_factory=dict)
    """The annotator's own parameters."""
    annotator_checkpoint: str | None = None
    """Alias of the weights of a learned annotator."""
    controlnet_conditioning_scale: Number = 1.0
    """How strongly the ControlNet steers."""
    control_guidance_start: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the steps after which the ControlNet starts."""
    control_guidance_end: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the steps after which the ControlNet stops."""


class LoraSpec(_Part):
    """A LoRA and its weight."""

    checkpoint: str
    """Alias of a LoRA."""
    weight: Number = 1.0
    """Strength of the adapter."""


class TextualInversionSpec(_Part):
    """A textual inversion: a learned word that prompts write as ``<alias>``."""

    checkpoint: str
    """Alias of a textual inversion; prompts write `<alias>`."""


class IPAdapterSpec(_Part):
    """An IP-Adapter, its reference picture and its weight."""

    checkpoint: str
    """Alias of an IP-Adapter."""
    image: ImageSpec
    """The reference picture, of any size."""
    weight: Number = 1.0
    """Strength of the adapter."""


AdapterSpec = LoraSpec | TextualInversionSpec | IPAdapterSpec


class OutputSpec(_Part):
    """Encoding of pictures."""

    format: Literal["png", "jpeg", "webp"] = "png"
    """File format; png is lossless."""
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """Quality of a jpeg or webp."""
    metadata: Literal["embedded+sidecar"] = "embedded+sidecar"
    """Places where a picture's provenance record is kept."""


class Budget(_Part):
    """Limits at which a campaign pauses itself."""

    max_gpu_seconds: Annotated[float, Field(gt=0)] | None = None
    """Device seconds, failed attempts included."""
    max_images: Annotated[int, Field(ge=1, le=2**53 - 1)] | None = None
    """Number of pictures, of any stage."""
    max_cost: Annotated[float, Field(gt=0)] | None = None
    """Cost in the currency of SDP_COST_PER_GPU_HOUR."""


class Schedule(_Part):
    """Cron schedule of a campaign, run as the same campaign or as a new edition each time."""

    cron: str
    """Minute, hour, day of month, month and day of week, as in "0 3 * * *"."""
    timezone: str = "UTC"
    """Time zone of the cron expression, as in Europe/Berlin."""
    mode: Literal["incremental", "edition"] = "incremental"
    """`incremental` makes what is new or changed; `edition` makes all of it again, with the date as `{{ edition }}`."""
    on_overlap: Literal["skip", "queue"] = "skip"
    """`skip` or `queue` an edition that is due while an older one is unfinished."""


class Quality(_Part):
    """Minimum quality scores; black, flat or non-finite pictures are always refused, without a threshold."""

    min_sharpness: Annotated[float, Field(ge=0)] | None = None
    """Minimum sharpness."""
    min_edge_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    """Minimum share of the control map's edges that the picture reproduces."""


class Provenance(_Part):
    """Content of the provenance record in a picture; every picture is marked as AI-made and signed."""

    include_prompt: Literal["full", "hash", "none"] = "full"
    """Prompts in the file: `full`, as their SHA-256 (`hash`), or `none`; the sidecar always has them."""


class Policy(_Part):
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


class Parameters(_Part):
    """Generation parameters under diffusers' names; a string is a template."""

    width: Integer | None = None
    """Pixels; in super-resolution the input decides."""
    height: Integer | None = None
    """Pixels; in super-resolution the input decides."""
    num_inference_steps: Integer | None = None
    """Denoising steps."""
    guidance_scale: Number | None = None
    """How closely the prompt is followed; 1 means no guidance."""
    strength: Number | None = None
    """How much of the input picture is changed: 0 keeps it, 1 ignores it."""
    scheduler: str | None = None
    """The scheduler (sampler) of the denoising steps."""
    negative_prompt: str | None = None
    """Prompt for what the picture should not show; a template."""
    clip_skip: Integer | None = None
    """Number of last text encoder layers to skip."""
    noise_level: Integer | None = None
    """Noise that an upscaler adds to its input."""
    resize: str | None = None
    """Resize mode for inputs of another size; without it they are refused."""


class Stage(Parameters):
    """One step of the chain: one picture per row, variable combination and seed."""

    id: Name
    """Name that later stages refer to."""
    task: Annotated[Task, Field(strict=False)]
    checkpoint: str | None = None
    """Alias of this stage's weights; default the campaign's."""
    prompt: str = ""
    """The prompt; a template. Values from a table are data, never templates."""
    seed: Literal["same"] | None = None
    """`same` uses the root seed instead of one derived for this stage."""
    seeds: Seeds | None = None
    """This stage's own noise seeds: one picture for each."""
    image: ImageSpec | None = None
    """The input picture, to edit or to upscale."""
    mask_image: ImageSpec | None = None
    """Inpainting mask: white areas are repainted."""
    controlnets: list[ControlNetSpec] = Field(default_factory=list)
    """ControlNets that steer this stage together."""
    loras: list[LoraSpec] = Field(default_factory=list)
    """LoRAs applied together."""
    textual_inversions: list[TextualInversionSpec] = Field(default_factory=list)
    """Textual inversions that prompts may use."""
    ip_adapters: list[IPAdapterSpec] = Field(default_factory=list)
    """IP-Adapters with their reference pictures."""
    vae: str | None = None
    """Alias of an autoencoder that replaces the checkpoint's own for decoding."""
    reproducibility: Reproducibility | None = None
    """How exactly this stage's pictures must be reproducible; default the campaign's."""
    profile: Profile | None = None
    """Speed profile of this stage; default the campaign's."""
    output: OutputSpec | None = None
    """Encoding of this stage's pictures; default the campaign's."""
    quality: Quality | None = None
    """Minimum quality scores of this stage; default the campaign's."""

    def images(self) -> list[tuple[KeyPath, ImageSpec]]:
        """Return every picture the stage consumes, with its place inside the stage."""
        named: list[tuple[KeyPath, ImageSpec | None]] = [(("image",), self.image), (("mask_image",), self.mask_image)]
        named += [(("controlnets", n, "image"), use.image) for n, use in enumerate(self.controlnets)]
        named += [(("ip_adapters", n, "image"), use.image) for n, use in enumerate(self.ip_adapters)]
        return [(place, image) for place, image in named if image is not None]

    def sized_images(self) -> list[KeyPath]:
        """Return the places of pictures that must have the stage's size; an IP-Adapter takes any size."""
        return [place for place, _ in self.images() if place[0] != "ip_adapters"]

    def adapters(self) -> list[tuple[KeyPath, AdapterSpec]]:
        """Return every adapter of the stage, with its place inside the stage."""
        worn: dict[str, Sequence[AdapterSpec]] = {
            "loras": self.loras,
            "textual_inversions": self.textual_inversions,
            "ip_adapters": self.ip_adapters,
        }
        return [((key, n), use) for key, uses in worn.items() for n, use in enumerate(uses)]

    def aliases(self) -> list[str]:
        """Return every checkpoint the stage names itself."""
        own = [self.checkpoint, self.vae, *(use.checkpoint for use in self.controlnets)]
        own += [use.checkpoint for _, use in self.adapters()]
        return [alias for alias in [*own, *(use.annotator_checkpoint for use in self.controlnets)] if alias]

    def parents(self) -> list[str]:
        """Return the stages whose pictures this stage consumes, each once."""
        return list(dict.fromkeys(image.stage for _, image in self.images() if image.stage))


class CampaignSpec(_Part):
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
    quality: Quality = Quality()
    """Minimum quality scores of every picture."""
    output: OutputSpec = OutputSpec()
    """Encoding of pictures."""
    provenance: Provenance = Provenance()
    """Content of the provenance record in a picture."""


LIMITS: Mapping[str, tuple[type, float, float]] = {
    "width": (int, 8, LARGEST_SIDE),
    "height": (int, 8, LARGEST_SIDE),
    "num_inference_steps": (int, 1, 1000),
    "guidance_scale": (float, 0, 100),
    "strength": (float, 0, 1),
    "clip_skip": (int, 1, 12),
    "noise_level": (int, 0, 1000),
    "controlnet_conditioning_scale": (float, 0, 10),
    "weight": (float, -10, 10),
}
"""Numeric parameters: their type and inclusive range."""


def number(name: str, value: Any) -> int | float:
    """Convert a parameter's value to its type and check its range; raises ValueError."""
    kind, low, high = LIMITS[name]
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, OverflowError, TypeError):
        result = math.nan
    if not math.isfinite(result) or (kind is int and result != int(result)):
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{shown(value)} is not {wanted} from {low:g} to {high:g}")
    if not low <= result <= high:
        raise ValueError(f"{shown(value)} is not from {low:g} to {high:g}")
    return int(result) if kind is int else result


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean X?`` or the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name[:100], names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    some = ", ".join(names[:30]) + (", ..." if len(names) > 30 else "")
    return f"there are {some}" if len(names) > 1 else f"there is only {some}" if names else "there are none"


def shown(value: Any) -> str:
    """Format a value from a file for an error message."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "nothing"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "keys with values"
    text = repr(value).removesuffix(".0")
    return text if len(text) <= 60 else text[:57] + "..." + text[-1]


def parse(data: Any, faults: Faults) -> CampaignSpec | None:
    """Validate the file's shape; return ``None`` if no part of it can be checked.

    Invalid parts go to ``faults`` and are removed or replaced, so that the rest can be checked too.
    """
    if not isinstance(data, dict):
        faults.add((), "is not a campaign", "write at least name:, checkpoint: and stages:")
        return None
    data = copy.deepcopy(data)
    # A replacement never fails itself, so the second round only sees what the first one uncovered.
    for _ in range(3):
        try:
            return CampaignSpec.model_validate(data)
        except ValidationError as error:
            places = note_faults(error, data, (), faults)
            faults.next_phase()
        if any(path[:1] == ("stages",) and len(path) == 1 for path in places):
            return None
        for path in places:
            _mend(data, path)
    return None


def note_faults(
    error: ValidationError, data: Any, at: KeyPath, faults: Faults, *, shape: type[BaseModel] | None = None
) -> list[KeyPath]:
    """Note Pydantic's errors about the value ``at`` a place; a union's errors about one value become one.

    ``shape`` is the model of a file that is not a campaign.
    """
    grouped: dict[KeyPath, list[Any]] = {}
    for fault in error.errors():
        grouped.setdefault(_in_file(tuple(fault["loc"]), data), []).append(fault)
    unknown = {path for path, about in grouped.items() if about[0]["type"] == "extra_forbidden"}
    for path, about in grouped.items():
        beside = [str(other[-1]) for other in unknown if other[:-1] == path[:-1]]
        if about[0]["type"] == "missing" and difflib.get_close_matches(str(path[-1]), beside, n=1):
            faults.hide((*at, *path))  # it is there, misspelt
            continue
        faults.add((*at, *path), *_in_words(about, (*at, *path), shape or CampaignSpec))
    for path in unknown:
        # Do not report the key it was meant for as missing as well.
        known = _known_keys((*at, *path), shape or CampaignSpec)
        for meant in difflib.get_close_matches(str(path[-1]), list(known), n=1):
            faults.hide((*at, *path[:-1], meant))
    return list(grouped)


def _in_file(loc: KeyPath, data: Any) -> KeyPath:
    """Return the error's place without the parts pydantic adds for unions (type names and the like)."""
    path: KeyPath = ()
    here = data
    for n, part in enumerate(loc):
        last = n == len(loc) - 1
        keyed = isinstance(here, dict) and isinstance(part, str) and (part in here or (last and part != "[key]"))
        indexed = isinstance(here, list) and isinstance(part, int) and part < len(here)
        if keyed or indexed:
            path = (*path, part)
            here = here.get(part) if isinstance(here, dict) else here[part]
    return path


REMOVED_VALUES = {("reproducibility", "fast"): "write profile: fast, and leave reproducibility out"}
"""What to write instead of a value that earlier releases had, by key and value."""


def _in_words(about: list[Any], path: KeyPath, shape: type[BaseModel]) -> tuple[str, str | None]:
    kinds = [fault["type"] for fault in about]
    if "extra_forbidden" in kinds:
        return "unknown key", nearest(str(path[-1]), _known_keys(path, shape))
    if "missing" in kinds:
        return "is missing", "add it"
    fault = about[0]
    if any(fault["loc"][-1:] == ("[key]",) for fault in about):
        return "is no name for a variable", "a letter or _ first, then letters, digits and _, at most 63"
    found, expected = shown(fault["input"]), _expected(fault)
    if {"bool_type", "string_type"} <= set(kinds):
        expected = "a text, a number, true or false"
    elif "string_type" in kinds and len(kinds) > 1:
        expected += " or a template"
    if fault["type"] in ("enum", "literal_error"):
        options = [option.strip("' ") for option in fault["ctx"]["expected"].replace(" or ", ", ").split(",")]
        removed = REMOVED_VALUES.get((str(path[-1]), str(fault["input"])))
        return f"found {found}", removed or nearest(str(fault["input"]), options)
    return f"found {found}, expected {expected}", None


def _expected(fault: Any) -> str:
    limits = fault.get("ctx", {})
    match fault["type"]:
        case "string_pattern_mismatch" if limits["pattern"] == NAME:
            return "a name of a-z, 0-9 and -, at most 63, that does not start with -"
        case "greater_than":
            return f"more than {limits['gt']:g}"
        case "greater_than_equal":
            return f"at least {limits['ge']:g}"
        case "less_than_equal":
            return f"at most {limits['le']:,}"
        case "too_short":
            return "at least one entry"
        case "too_long":
            return f"at most {limits['max_length']:,} entries"
    words = {"int": "a whole number", "float": "a number", "string": "a text", "bool": "true or false"}
    words |= {"list": "a list", "dict": "keys with values", "model": "keys with values", "finite": "a finite number"}
    return words.get(str(fault["type"]).split("_")[0], str(fault["msg"]).lower())


def _known_keys(path: KeyPath, shape: type[BaseModel]) -> Iterable[str]:
    inner: Mapping[str, type[BaseModel]] = {
        "stages": Stage,
        "defaults": Parameters,
        "output": OutputSpec,
        "budget": Budget,
        "schedule": Schedule,
        "quality": Quality,
        "policy": Policy,
        "provenance": Provenance,
        "seeds": SeedRange,
        "image": ImageSpec,
        "mask_image": ImageSpec,
        "controlnets": ControlNetSpec,
        "loras": LoraSpec,
        "textual_inversions": TextualInversionSpec,
        "ip_adapters": IPAdapterSpec,
        "rows": Rows,
    }
    for part in path[:-1]:
        shape = inner.get(part, shape) if isinstance(part, str) else shape
    return list(shape.model_fields)


def _mend(data: Any, path: KeyPath) -> None:
    """Remove the invalid value at ``path``, or replace it if it is required."""
    holder = data
    for part in path[:-1]:
        inside = part in holder if isinstance(holder, dict) else isinstance(part, int) and part < len(holder)
        if not inside:
            return  # removed with another fault
        holder = holder[part]
    stand_in = _stand_in(path)
    if stand_in is not None:
        holder[path[-1]] = stand_in
    elif isinstance(holder, dict):
        holder.pop(path[-1], None)
    else:
        _mend(data, path[:-1])


def _stand_in(path: KeyPath) -> Any:
    picture = {"file": "-"}
    match path:
        case ("name",):
            return "unnamed"
        case ("checkpoint",) | ("stages", int(), str(), int(), "checkpoint"):
            return ""
        case ("stages", int(n)):
            return {"id": f"unnamed-{n}", "task": "text-to-image", "prompt": "-"}
        case ("stages", int(n), "id"):
            return f"unnamed-{n}"
        case ("stages", int(), "task"):
            return "text-to-image"
        case ("stages", int(), "controlnets", int()):
            return {"checkpoint": "", "image": picture}
        case ("stages", int(), "ip_adapters", int()):
            return {"checkpoint": "", "image": picture}
        case ("stages", int(), "loras" | "textual_inversions", int()):
            return {"checkpoint": ""}
        case ("stages", int(), "controlnets" | "ip_adapters", int(), "image"):
            return picture
    return None
