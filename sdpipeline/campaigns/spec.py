"""What a campaign file may say, as the shapes its text is read into."""

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
    # Strict, so that `true` is no 1 and "4" no 4: what a file says is refused or meant.
    # What stands below a key is its description, in the editor too.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class SeedRange(_Part):
    """``count`` seeds from ``start`` on."""

    start: Seed = 0
    """The first seed."""
    count: Annotated[int, Field(ge=1, le=MOST_SEEDS)] = 1
    """How many seeds: one picture of each row and combination for each."""


Seeds = Annotated[
    Annotated[SeedRange, Tag("range")] | Annotated[list[Seed], Field(min_length=1, max_length=MOST_SEEDS), Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list) else "range"),
]


class Rows(_Part):
    """A table whose rows are values, or a folder's files as one: one job chain per row."""

    file: str | None = None
    """A table beside this file or in a bucket, read as a stream."""
    files: str | None = None
    """Pictures beside this file, one a row, as in `pictures/*.png`, instead of a table."""
    key: str | None = None
    """The title of the column that names a row for ever; without it a row is known by its content."""
    columns: dict[Variable, str] | None = None
    """Variables with the titles of their columns; without it every column is a variable in lower case."""


class ImageSpec(_Part):
    """A picture from an earlier stage, from a file beside the campaign, or from a bucket."""

    stage: str | None = None
    """The id of an earlier stage, whose picture of the same row, combination and seed is taken."""
    file: str | None = None
    """A picture beside this file; a template."""
    url: str | None = None
    """A picture in a bucket, as in `s3://bucket/key`; a template."""


class ControlNetSpec(_Part):
    """One ControlNet and what steers it."""

    checkpoint: str
    """Alias of a ControlNet."""
    image: ImageSpec
    """The picture that steers it."""
    annotator: str = "none"
    """What turns that picture into a control map; `none` takes it as the map it is."""
    annotator_parameters: dict[str, Scalar] = Field(default_factory=dict)
    """The annotator's own numbers."""
    annotator_checkpoint: str | None = None
    """Alias of the weights of a learned annotator."""
    controlnet_conditioning_scale: Number = 1.0
    """How strongly it steers."""
    control_guidance_start: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of the steps after which it begins."""
    control_guidance_end: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The share of the steps after which it ends."""


class LoraSpec(_Part):
    """A LoRA and how strongly it is felt."""

    checkpoint: str
    """Alias of a LoRA."""
    weight: Number = 1.0
    """How strongly it is felt."""


class TextualInversionSpec(_Part):
    """A word of one's own, which prompts write as ``<alias>``."""

    checkpoint: str
    """Alias of a textual inversion; prompts write `<alias>`."""


class IPAdapterSpec(_Part):
    """An IP-Adapter, the picture it takes its likeness from, and how strongly that is felt."""

    checkpoint: str
    """Alias of an IP-Adapter."""
    image: ImageSpec
    """The picture it takes its likeness from, of any size."""
    weight: Number = 1.0
    """How strongly it is felt."""


AdapterSpec = LoraSpec | TextualInversionSpec | IPAdapterSpec


class OutputSpec(_Part):
    """How pictures are encoded."""

    format: Literal["png", "jpeg", "webp"] = "png"
    """png is lossless."""
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """Of a jpeg or webp."""
    metadata: Literal["embedded+sidecar"] = "embedded+sidecar"
    """Where the record of what made a picture is kept."""


class Budget(_Part):
    """What a campaign may spend before it pauses itself."""

    max_gpu_seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds on devices, failed attempts included."""
    max_images: Annotated[int, Field(ge=1, le=2**53 - 1)] | None = None
    """Pictures of any stage."""
    max_cost: Annotated[float, Field(gt=0)] | None = None
    """In the currency of SDP_COST_PER_GPU_HOUR."""


class Schedule(_Part):
    """When a campaign is made, and whether as the same campaign or as a new edition each time."""

    cron: str
    """Minute, hour, day of month, month and day of week, as in "0 3 * * *"."""
    timezone: str = "UTC"
    """The zone of those hours, as in Europe/Berlin."""
    mode: Literal["incremental", "edition"] = "incremental"
    """`incremental` makes what is new or changed; `edition` makes all of it again, with the date as `{{ edition }}`."""
    on_overlap: Literal["skip", "queue"] = "skip"
    """What becomes of an edition that is due while an older one is being made."""


class Quality(_Part):
    """Scores a picture must reach; what is always refused (black, flat, not finite) needs no threshold."""

    min_sharpness: Annotated[float, Field(ge=0)] | None = None
    """The least sharpness."""
    min_edge_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    """The least share of a control map's edges that the picture has."""


class Provenance(_Part):
    """What a picture's own record tells; it is marked as AI-made and signed in any case."""

    include_prompt: Literal["full", "hash", "none"] = "full"
    """Whether prompts stand in the file: `full`, as their SHA-256 (`hash`), or `none`; the sidecar has them always."""


class Policy(_Part):
    """What a campaign may ask for at all."""

    checkpoints: list[str] | None = None
    """All aliases that stages may name, ControlNets, adapters and annotators included."""
    licences: list[Annotated[str, Field(min_length=1, max_length=200)]] | None = None
    """All licences that weights may be registered under."""
    purposes: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(default_factory=list)
    """What the pictures are for: weights must be approved for each of these."""
    safety_checker: Annotated[str, Field(pattern=NAME)] | None = None
    """Alias of the network that looks at every finished picture and may forbid it."""
    max_width: Annotated[int, Field(ge=8, le=LARGEST_SIDE)] | None = None
    """The widest finished picture, in pixels."""
    max_height: Annotated[int, Field(ge=8, le=LARGEST_SIDE)] | None = None
    """The highest finished picture, in pixels."""
    deny: list[Annotated[str, Field(min_length=1, max_length=1000)]] = Field(default_factory=list)
    """Words and phrases that no prompt may hold, its variables filled in."""
    allow: list[Annotated[str, Field(min_length=1, max_length=1000)]] = Field(default_factory=list)
    """Phrases inside which a denied word is fine."""


class Parameters(_Part):
    """Generation parameters under diffusers' names; a string is a template."""

    width: Integer | None = None
    """Pixels; for super-resolution the input decides."""
    height: Integer | None = None
    """Pixels; for super-resolution the input decides."""
    num_inference_steps: Integer | None = None
    """Denoising steps."""
    guidance_scale: Number | None = None
    """How closely the prompt is followed; 1 is without guidance."""
    strength: Number | None = None
    """How much of the input picture is made anew: 0 keeps it, 1 forgets it."""
    scheduler: str | None = None
    """How the steps are taken."""
    negative_prompt: str | None = None
    """What is not wanted; a template."""
    clip_skip: Integer | None = None
    """How many last layers of the text encoder are left out."""
    noise_level: Integer | None = None
    """How much noise an upscaler adds to its input."""
    resize: str | None = None
    """What to do with an input of another size; without it that is refused."""


class Stage(Parameters):
    """One step of the chain: one picture per row, variable combination and seed."""

    id: Name
    """A name that later stages refer to."""
    task: Annotated[Task, Field(strict=False)]
    checkpoint: str | None = None
    """Alias of this stage's weights; without it the campaign's."""
    prompt: str = ""
    """What is wanted; a template. Values from a table are data, never templates."""
    seed: Literal["same"] | None = None
    """`same` uses the root seed instead of one derived for this stage."""
    seeds: Seeds | None = None
    """Noise seeds of this stage's own: one picture for each."""
    image: ImageSpec | None = None
    """The picture that is edited or enlarged."""
    mask_image: ImageSpec | None = None
    """White where the picture is painted anew."""
    controlnets: list[ControlNetSpec] = Field(default_factory=list)
    """ControlNets that steer this stage together."""
    loras: list[LoraSpec] = Field(default_factory=list)
    """LoRAs worn together."""
    textual_inversions: list[TextualInversionSpec] = Field(default_factory=list)
    """Words of your own."""
    ip_adapters: list[IPAdapterSpec] = Field(default_factory=list)
    """Pictures whose likeness is taken."""
    vae: str | None = None
    """Alias of an autoencoder to decode with instead of the checkpoint's own."""
    reproducibility: Reproducibility | None = None
    """How exactly this stage's pictures must come out again; without it as the campaign says."""
    profile: Profile | None = None
    """What this stage trades for speed; without it as the campaign says."""
    output: OutputSpec | None = None
    """How this stage's pictures are encoded; without it as the campaign says."""
    quality: Quality | None = None
    """Scores this stage's pictures must reach; without it those of the campaign."""

    def images(self) -> list[tuple[KeyPath, ImageSpec]]:
        """Every picture the stage consumes, with its place inside the stage."""
        named: list[tuple[KeyPath, ImageSpec | None]] = [(("image",), self.image), (("mask_image",), self.mask_image)]
        named += [(("controlnets", n, "image"), use.image) for n, use in enumerate(self.controlnets)]
        named += [(("ip_adapters", n, "image"), use.image) for n, use in enumerate(self.ip_adapters)]
        return [(place, image) for place, image in named if image is not None]

    def sized_images(self) -> list[KeyPath]:
        """Places of those that have to be of the stage's size; an IP-Adapter looks at any."""
        return [place for place, _ in self.images() if place[0] != "ip_adapters"]

    def adapters(self) -> list[tuple[KeyPath, AdapterSpec]]:
        """Everything the checkpoint wears, with its place inside the stage."""
        worn: dict[str, Sequence[AdapterSpec]] = {
            "loras": self.loras,
            "textual_inversions": self.textual_inversions,
            "ip_adapters": self.ip_adapters,
        }
        return [((key, n), use) for key, uses in worn.items() for n, use in enumerate(uses)]

    def aliases(self) -> list[str]:
        """Every checkpoint the stage names itself."""
        own = [self.checkpoint, self.vae, *(use.checkpoint for use in self.controlnets)]
        own += [use.checkpoint for _, use in self.adapters()]
        return [alias for alias in [*own, *(use.annotator_checkpoint for use in self.controlnets)] if alias]

    def parents(self) -> list[str]:
        """Stages whose pictures this stage consumes, each once."""
        return list(dict.fromkeys(image.stage for _, image in self.images() if image.stage))


class CampaignSpec(_Part):
    """A whole campaign file."""

    name: Name
    """Lower-case letters, digits and `-`; the same name again is the next version of the campaign."""
    checkpoint: str
    """Alias of the weights; a stage may name its own."""
    priority: Annotated[int, Field(ge=0, le=1000)] = 100
    """Lower runs first."""
    budget: Budget = Budget()
    """What may be spent before the campaign pauses itself."""
    schedule: Schedule | None = None
    """When it is made without being asked."""
    subject: Annotated[str, Field(min_length=1)] | None = None
    """Whose data a job holds, as a template: what `erase --subject` finds it by."""
    reuse: bool = True
    """Whether a picture that was made before is copied instead of made again."""
    policy: Policy = Policy()
    """What may be asked for at all."""
    variables: dict[Variable, Any] = Field(default_factory=dict)
    """Lists of values by name, multiplied; `zip:` lists that advance together; `rows:` a table."""
    exclude: list[Choice] = Field(default_factory=list)
    """Combinations that are left out."""
    include: list[Choice] = Field(default_factory=list)
    """Combinations that are added to the product of the lists."""
    seeds: Seeds = SeedRange()
    """Root seeds, as a range or a list: one chain of pictures for each."""
    defaults: Parameters = Parameters()
    """Parameters for every stage whose task takes them."""
    stages: Annotated[list[Stage], Field(min_length=1, max_length=64)]
    """The steps of the chain: each makes one picture per row, combination and seed."""
    reproducibility: Reproducibility = "tolerant"
    """How exactly pictures must come out again."""
    profile: Profile | None = None
    """What is traded for speed; without it nothing (`exact`)."""
    quality: Quality = Quality()
    """Scores every picture must reach."""
    output: OutputSpec = OutputSpec()
    """How pictures are encoded."""
    provenance: Provenance = Provenance()
    """What the record in a picture tells."""


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
    """A parameter's value in its own type; ValueError says what is wrong with it."""
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
    """``did you mean X?`` or the list of what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name[:100], names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    some = ", ".join(names[:30]) + (", ..." if len(names) > 30 else "")
    return f"there are {some}" if len(names) > 1 else f"there is only {some}" if names else "there are none"


def shown(value: Any) -> str:
    """A value from a file as a mistake quotes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "nothing"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "keys with values"
    text = repr(value).removesuffix(".0")
    return text if len(text) <= 60 else text[:57] + "..." + text[-1]


def parse(data: Any, faults: Faults) -> CampaignSpec | None:
    """The file's shape. What is wrong goes to ``faults`` and is left out or stood in for, so that the rest
    can be checked too; ``None`` where nothing can."""
    if not isinstance(data, dict):
        faults.add((), "is not a campaign", "write at least name:, checkpoint: and stages:")
        return None
    data = copy.deepcopy(data)
    # A stand-in never fails itself, so the second round only sees what the first uncovered.
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
    """Pydantic's faults about the value ``at`` a place; a union's several complaints about one value become one.

    ``shape`` is that of a file which is no campaign.
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
        # Nor is what it was meant for told to be missing besides.
        known = _known_keys((*at, *path), shape or CampaignSpec)
        for meant in difflib.get_close_matches(str(path[-1]), list(known), n=1):
            faults.hide((*at, *path[:-1], meant))
    return list(grouped)


def _in_file(loc: KeyPath, data: Any) -> KeyPath:
    """The fault's place without the parts pydantic adds for unions (type names and the like)."""
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
        return f"found {found}", nearest(str(fault["input"]), options)
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
    """Leave out what is wrong at ``path``, or put something in its place where it is required."""
    holder = data
    for part in path[:-1]:
        inside = part in holder if isinstance(holder, dict) else isinstance(part, int) and part < len(holder)
        if not inside:
            return  # gone with another fault
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
