"""What a campaign file may say, and every mistake in one, found before anything is written."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sdpipeline import yamlfile
from sdpipeline.domain import Task
from sdpipeline.engine import conditioning, families
from sdpipeline.engine.checkpoints import CheckpointFiles
from sdpipeline.errors import CampaignError, Mistake
from sdpipeline.templates import TemplateRefusedError, compile_template
from sdpipeline.yamlfile import KeyPath, Located

NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]{0,62}$"
LARGEST_SIDE = 8192
MOST_SEEDS = 1_000_000
LARGEST_SEED = 2**63 - 1

Name = Annotated[str, Field(pattern=NAME)]
Variable = Annotated[str, Field(pattern=VARIABLE)]
Scalar = bool | int | float | str
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Number = float | str
Integer = int | str


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SeedRange(_Part):
    """``count`` seeds from ``start`` on."""

    start: Seed = 0
    count: Annotated[int, Field(ge=1, le=MOST_SEEDS)] = 1


Seeds = SeedRange | Annotated[list[Seed], Field(min_length=1, max_length=MOST_SEEDS)]


class Rows(_Part):
    """A table whose rows are values: one job chain per row."""

    file: str
    key: str | None = None
    columns: dict[Variable, str] | None = None


class ImageSpec(_Part):
    """A picture from an earlier stage or from a file beside the campaign."""

    stage: str | None = None
    file: str | None = None


class ControlNetSpec(_Part):
    """One ControlNet and what steers it."""

    checkpoint: str
    image: ImageSpec
    annotator: str = "none"
    annotator_parameters: dict[str, Scalar] = Field(default_factory=dict)
    controlnet_conditioning_scale: Number = 1.0
    control_guidance_start: Annotated[float, Field(ge=0, le=1)] = 0.0
    control_guidance_end: Annotated[float, Field(ge=0, le=1)] = 1.0


class OutputSpec(_Part):
    """How pictures are encoded."""

    format: Literal["png", "jpeg", "webp"] = "png"
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    metadata: Literal["embedded+sidecar"] = "embedded+sidecar"


class Parameters(_Part):
    """Generation parameters under diffusers' names; a string is a template."""

    width: Integer | None = None
    height: Integer | None = None
    num_inference_steps: Integer | None = None
    guidance_scale: Number | None = None
    strength: Number | None = None
    scheduler: str | None = None
    negative_prompt: str | None = None
    clip_skip: Integer | None = None
    noise_level: Integer | None = None
    resize: str | None = None


class Stage(Parameters):
    """One step of the chain: one picture per row, variable combination and seed."""

    id: Name
    task: Task
    checkpoint: str | None = None
    prompt: str = ""
    seed: Literal["same"] | None = None
    seeds: Seeds | None = None
    image: ImageSpec | None = None
    mask_image: ImageSpec | None = None
    controlnets: list[ControlNetSpec] = Field(default_factory=list)
    output: OutputSpec | None = None


class CampaignSpec(_Part):
    """A whole campaign file."""

    name: Name
    checkpoint: str
    priority: Annotated[int, Field(ge=0, le=1000)] = 100
    variables: dict[Variable, Any] = Field(default_factory=dict)
    seeds: Seeds = SeedRange()
    defaults: Parameters = Parameters()
    stages: Annotated[list[Stage], Field(min_length=1, max_length=64)]
    output: OutputSpec = OutputSpec()


LIMITS: Mapping[str, tuple[type, float, float]] = {
    "width": (int, 8, LARGEST_SIDE),
    "height": (int, 8, LARGEST_SIDE),
    "num_inference_steps": (int, 1, 1000),
    "guidance_scale": (float, 0, 100),
    "strength": (float, 0, 1),
    "clip_skip": (int, 0, 12),
    "noise_level": (int, 0, 1000),
    "controlnet_conditioning_scale": (float, 0, 10),
}
"""Numeric parameters: their type and inclusive range."""

Catalog = Mapping[str, CheckpointFiles]
"""The checkpoints a campaign may name, by alias."""


@dataclass(frozen=True, slots=True)
class Axes:
    """``variables:`` sorted out: named lists that multiply, lists that advance together, and a table."""

    product: Mapping[str, list[Scalar]]
    zipped: Mapping[str, list[Scalar]]
    rows: Rows | None


@dataclass(frozen=True, slots=True)
class Campaign:
    """A checked campaign file, ready to expand."""

    spec: CampaignSpec
    axes: Axes
    source: Located
    text: str
    folder: Path
    catalog: Catalog

    def stage_order(self) -> list[Stage]:
        """Stages with parents before children."""
        return _ordered(self.spec.stages)


def load(path: Path, catalog: Catalog) -> Campaign:
    """Read and check a campaign file; raises CampaignError holding all mistakes."""
    source = yamlfile.load(path)
    spec = _parse(source)
    axes, mistakes = _axes(spec, source)
    mistakes += list(_check_stages(spec, source, catalog))
    if not mistakes:
        mistakes += list(_check_variables(spec, axes, source))
    if mistakes:
        raise CampaignError(*mistakes)
    return Campaign(spec, axes, source, path.read_text(encoding="utf-8"), path.resolve().parent, catalog)


def number(name: str, value: Any) -> int | float:
    """A parameter's value in its own type; ValueError says what is wrong with it."""
    kind, low, high = LIMITS[name]
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, OverflowError, TypeError):
        result = math.nan
    whole = kind is float or result == int(result) if math.isfinite(result) else False
    if not whole or not low <= result <= high:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{value!r} is not {wanted} from {low:g} to {high:g}")
    return int(result) if kind is int else result


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean X?`` or the list of what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names) or 'none'}"


def parents_of(stage: Stage) -> list[str]:
    """Stages whose pictures this stage consumes."""
    specs = [stage.image, stage.mask_image, *(use.image for use in stage.controlnets)]
    return list(dict.fromkeys(spec.stage for spec in specs if spec is not None and spec.stage))


def _parse(source: Located) -> CampaignSpec:
    if not isinstance(source.data, dict):
        fix = "write at least name:, checkpoint: and stages:"
        raise CampaignError(Mistake(file=source.file, message="is not a campaign", fix=fix))
    try:
        return CampaignSpec.model_validate(source.data, strict=False)
    except ValidationError as error:
        raise CampaignError(*_located_faults(error, source)) from error


def _located_faults(error: ValidationError, source: Located) -> list[Mistake]:
    """Pydantic's faults at their place; a union's several complaints about one value become one."""
    seen: dict[KeyPath, Mistake] = {}
    for fault in error.errors():
        path = _in_file(tuple(fault["loc"]), source)
        seen.setdefault(path, _fault_as_mistake(fault, path, source))
    return list(seen.values())


def _in_file(loc: KeyPath, source: Located) -> KeyPath:
    """The fault's place without the parts pydantic adds for unions (type names and the like)."""
    path: KeyPath = ()
    for part in loc:
        here: Any = source.data
        for step in path:
            here = here[step]
        keyed = isinstance(here, dict) and isinstance(part, str) and (part in here or part == loc[-1])
        indexed = isinstance(here, list) and isinstance(part, int) and part < len(here)
        if keyed or indexed:
            path = (*path, part)
    return path


def _fault_as_mistake(fault: Any, path: KeyPath, source: Located) -> Mistake:
    if fault["type"] == "extra_forbidden":
        known = _known_keys(path)
        return source.mistake(path, "unknown key", nearest(str(path[-1]), known))
    if fault["type"] == "missing":
        return source.mistake(path, "is missing", "add it")
    found = fault.get("input")
    shown = repr(found) if isinstance(found, Scalar) else f"a {type(found).__name__}"
    message = str(fault["msg"])
    return source.mistake(path, f"found {shown[:60]}: {message[0].lower()}{message[1:]}")


def _known_keys(path: KeyPath) -> Iterable[str]:
    shape: Any = CampaignSpec
    inner: Mapping[str, Any] = {
        "stages": Stage,
        "defaults": Parameters,
        "output": OutputSpec,
        "seeds": SeedRange,
        "image": ImageSpec,
        "mask_image": ImageSpec,
        "controlnets": ControlNetSpec,
        "rows": Rows,
    }
    for part in path[:-1]:
        shape = inner.get(str(part), shape) if not isinstance(part, int) else shape
    return list(shape.model_fields)


def _axes(spec: CampaignSpec, source: Located) -> tuple[Axes, list[Mistake]]:
    product: dict[str, list[Scalar]] = {}
    zipped: dict[str, list[Scalar]] = {}
    rows: Rows | None = None
    mistakes: list[Mistake] = []
    values = TypeAdapter(Annotated[list[Scalar], Field(min_length=1)])
    for name, value in spec.variables.items():
        path: KeyPath = ("variables", name)
        try:
            if name == "rows":
                rows = Rows.model_validate(value)
            elif name == "zip":
                zipped = TypeAdapter(dict[Variable, Annotated[list[Scalar], Field(min_length=1)]]).validate_python(
                    value
                )
            else:
                product[name] = values.validate_python(value)
        except ValidationError as error:
            for fault in error.errors():
                place = _in_file((*path, *fault["loc"]), source)
                mistakes.append(_fault_as_mistake(fault, place, source))
    lengths = {len(items) for items in zipped.values()}
    if len(lengths) > 1:
        mistakes.append(source.mistake(("variables", "zip"), "its lists have different lengths", "make them equal"))
    taken = [*product, *zipped, *((rows.columns or {}) if rows else {})]
    twice = sorted({name for name in taken if taken.count(name) > 1})
    mistakes += [
        source.mistake(("variables",), f"the variable {name!r} is declared twice", "rename one") for name in twice
    ]
    return Axes(product, zipped, rows), mistakes


def _check_stages(spec: CampaignSpec, source: Located, catalog: Catalog) -> Iterator[Mistake]:
    yield from _numbers(spec.defaults, ("defaults",), source)
    yield from _names_exist(spec, source)
    if spec.checkpoint not in catalog:
        yield source.mistake(("checkpoint",), f"no checkpoint {spec.checkpoint!r}", nearest(spec.checkpoint, catalog))
    for n, stage in enumerate(spec.stages):
        path: KeyPath = ("stages", n)
        yield from _numbers(stage, path, source)
        yield from _check_pictures(stage, path, source)
        yield from _check_checkpoints(spec, stage, path, source, catalog)


def _names_exist(spec: CampaignSpec, source: Located) -> Iterator[Mistake]:
    ids = [stage.id for stage in spec.stages]
    for n, stage in enumerate(spec.stages):
        if stage.id in ids[:n]:
            yield source.mistake(("stages", n, "id"), f"there are two stages {stage.id!r}", "rename one")
        for parent in parents_of(stage):
            if parent not in ids:
                yield source.mistake(("stages", n), f"no stage {parent!r}", nearest(parent, ids))
    if all(parent in ids for stage in spec.stages for parent in parents_of(stage)):
        ordered = [stage.id for stage in _ordered(spec.stages)]
        for n, stage in enumerate(spec.stages):
            if stage.id not in ordered:
                fix = "a stage can only use pictures of stages that do not need its own"
                yield source.mistake(("stages", n), f"stage {stage.id!r} is part of a cycle", fix)


def _ordered(stages: list[Stage]) -> list[Stage]:
    """Topological order, keeping the file's order among equals; stages of a cycle are left out."""
    done: list[Stage] = []
    while ready := [s for s in stages if s not in done and set(parents_of(s)) <= {d.id for d in done}]:
        done.append(ready[0])
    return done


def _numbers(part: Parameters, path: KeyPath, source: Located) -> Iterator[Mistake]:
    for name in LIMITS:
        value = getattr(part, name, None)
        if value is not None and not _is_template(value):
            try:
                number(name, value)
            except ValueError as error:
                yield source.mistake((*path, name), str(error))
    if part.resize is not None and part.resize not in conditioning.RESIZE_MODES:
        known = conditioning.RESIZE_MODES
        yield source.mistake((*path, "resize"), f"no mode {part.resize!r}", nearest(part.resize, known))


def _is_template(value: Any) -> bool:
    return isinstance(value, str) and "{" in value


def _check_pictures(stage: Stage, path: KeyPath, source: Located) -> Iterator[Mistake]:
    wanted = {
        "image": stage.task is not Task.TEXT_TO_IMAGE,
        "mask_image": stage.task is Task.INPAINTING,
    }
    for key, needed in wanted.items():
        given = getattr(stage, key) is not None
        if needed and not given:
            fix = f"add {key}: {{stage: ID}} or {key}: {{file: PATH}}"
            yield source.mistake((*path, key), f"{stage.task} needs it", fix)
        if given and not needed:
            yield source.mistake((*path, key), f"{stage.task} does not take it", "remove it")
    if stage.task is Task.TEXT_TO_IMAGE and not stage.prompt:
        yield source.mistake((*path, "prompt"), "text-to-image needs it", "add prompt:")
    if stage.task is Task.TEXT_TO_IMAGE and stage.strength is not None:
        yield source.mistake((*path, "strength"), "text-to-image does not take it", "remove it")
    if stage.seed and stage.seeds:
        yield source.mistake((*path, "seed"), "says the same seed and other seeds", "keep seed: or seeds:")
    images: list[tuple[KeyPath, ImageSpec | None]] = [((*path, key), getattr(stage, key)) for key in wanted]
    images += [((*path, "controlnets", n, "image"), use.image) for n, use in enumerate(stage.controlnets)]
    for place, image in images:
        if image is not None and (image.stage is None) == (image.file is None):
            yield source.mistake(place, "needs exactly one of stage: and file:")


def _check_checkpoints(
    spec: CampaignSpec, stage: Stage, path: KeyPath, source: Located, catalog: Catalog
) -> Iterator[Mistake]:
    alias = stage.checkpoint or spec.checkpoint
    if alias not in catalog:
        if stage.checkpoint:
            yield source.mistake((*path, "checkpoint"), f"no checkpoint {alias!r}", nearest(alias, catalog))
        return
    base = catalog[alias]
    place: KeyPath = (*path, "checkpoint") if stage.checkpoint else (*path, "task")
    if base.kind != "checkpoint":
        yield source.mistake(place, f"{alias!r} is a {base.kind}, not a checkpoint", "name a checkpoint here")
        return
    why = families.refusal(base.family, stage.task, controlnets=len(stage.controlnets))
    if why:
        yield source.mistake((*path, "task"), why)
        return
    scheduler = stage.scheduler
    if scheduler and not _is_template(scheduler) and (why := families.scheduler_refusal(base.family, scheduler)):
        yield source.mistake((*path, "scheduler"), why)
    for n, use in enumerate(stage.controlnets):
        yield from _check_controlnet(use, (*path, "controlnets", n), source, catalog, base)


def _check_controlnet(
    use: ControlNetSpec, path: KeyPath, source: Located, catalog: Catalog, base: CheckpointFiles
) -> Iterator[Mistake]:
    known = {alias for alias, files in catalog.items() if files.kind == "controlnet"}
    if use.checkpoint not in known:
        place: KeyPath = (*path, "checkpoint")
        yield source.mistake(place, f"no ControlNet {use.checkpoint!r}", nearest(use.checkpoint, known))
    elif catalog[use.checkpoint].family not in families.family(base.family).controlnets_of:
        message = f"{use.checkpoint!r} is for {catalog[use.checkpoint].family}, {base.alias!r} is {base.family}"
        yield source.mistake((*path, "checkpoint"), message, "name a ControlNet of the checkpoint's family")
    if use.control_guidance_start >= use.control_guidance_end:
        yield source.mistake((*path, "control_guidance_end"), "is not after control_guidance_start")
    if use.annotator not in conditioning.ANNOTATORS:
        yield source.mistake(
            (*path, "annotator"), f"no annotator {use.annotator!r}", nearest(use.annotator, conditioning.ANNOTATORS)
        )
        return
    ranges = conditioning.ANNOTATORS[use.annotator].parameters
    for name, value in use.annotator_parameters.items():
        place = (*path, "annotator_parameters", name)
        if name not in ranges:
            yield source.mistake(place, f"{use.annotator} has no parameter {name!r}", nearest(name, ranges))
        elif isinstance(value, str | bool) or not ranges[name].low <= value <= ranges[name].high:
            yield source.mistake(place, f"{value!r} is not from {ranges[name].low:g} to {ranges[name].high:g}")
    scale = use.controlnet_conditioning_scale
    if not _is_template(scale):
        try:
            number("controlnet_conditioning_scale", scale)
        except ValueError as error:
            yield source.mistake((*path, "controlnet_conditioning_scale"), str(error))


def _check_variables(spec: CampaignSpec, axes: Axes, source: Located) -> Iterator[Mistake]:
    """Every template compiles and uses declared variables; every declared variable is used."""
    open_table = axes.rows is not None and axes.rows.columns is None
    declared = {*axes.product, *axes.zipped, *((axes.rows.columns or {}) if axes.rows else {})}
    used: set[str] = set()
    for path, text in template_texts(spec):
        try:
            names = compile_template(text).names
        except TemplateRefusedError as error:
            yield source.mistake(path, str(error))
            continue
        used |= names
        # Columns of a table without `columns:` are known only when the table is opened.
        for name in sorted(names - declared) if not open_table else ():
            yield source.mistake(path, f"the variable {name!r} is not declared", nearest(name, declared))
    for name in sorted(declared - used):
        place: KeyPath = ("variables", name) if name in axes.product else ("variables",)
        yield source.mistake(place, f"the variable {name!r} is used nowhere", "use it in a template or remove it")


def template_texts(spec: CampaignSpec) -> Iterator[tuple[KeyPath, str]]:
    """Every string that may be a template, with its place."""
    names = ("prompt", *Parameters.model_fields)
    for name in Parameters.model_fields:
        if isinstance(value := getattr(spec.defaults, name), str):
            yield ("defaults", name), value
    for n, stage in enumerate(spec.stages):
        path: KeyPath = ("stages", n)
        for name in names:
            if isinstance(value := getattr(stage, name), str):
                yield (*path, name), value
        for key in ("image", "mask_image"):
            image: ImageSpec | None = getattr(stage, key)
            if image is not None and image.file:
                yield (*path, key, "file"), image.file
        for m, use in enumerate(stage.controlnets):
            if use.image.file:
                yield (*path, "controlnets", m, "image", "file"), use.image.file
            if isinstance(use.controlnet_conditioning_scale, str):
                yield (*path, "controlnets", m, "controlnet_conditioning_scale"), use.controlnet_conditioning_scale
