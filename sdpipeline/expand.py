"""A campaign as the stream of jobs it asks for: rows x variables x seeds, stage by stage."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdpipeline import rows as tables
from sdpipeline.batching import batch_key
from sdpipeline.campaign import Campaign, ControlNetSpec, ImageSpec, Parameters, SeedRange, Stage, number, parents_of
from sdpipeline.domain import (
    CheckpointRef,
    ControlNetInput,
    GenerationRequest,
    ImageSource,
    JobSpec,
    OutputFormat,
    Task,
    fingerprint,
    stage_seed,
)
from sdpipeline.engine import conditioning, families
from sdpipeline.engine.checkpoints import CheckpointFiles
from sdpipeline.errors import CampaignError, InputImageError, Mistake
from sdpipeline.inputs import InputFolder
from sdpipeline.templates import Template, TemplateRefusedError, compile_template
from sdpipeline.yamlfile import KeyPath

MOST_MISTAKES = 20
DEFAULT_SIDE = 512
"""Width and height where neither the stage, nor ``defaults:``, nor an input picture says one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """One row and one value of each variable: what a chain of stages shares, before seeds."""

    row_key: str
    line: int | None
    axes: tuple[tuple[str, Any], ...]
    values: Mapping[str, Any]


def expand(campaign: Campaign, inputs: InputFolder) -> Iterator[JobSpec]:
    """Every job, parents before children, in the file's order; constant memory.

    Raises CampaignError with the first mistakes that only values show: an undefined column, a number
    out of range, a missing picture.
    """
    expander = _Expander(campaign, inputs)
    for combination in combinations(campaign):
        for seed in _seeds(campaign.spec.seeds):
            yield from expander.chain(combination, seed)
            if len(expander.mistakes) >= MOST_MISTAKES:
                break
        if len(expander.mistakes) >= MOST_MISTAKES:
            break
    if expander.mistakes:
        raise CampaignError(*expander.mistakes)


def check(campaign: Campaign, inputs: InputFolder) -> int:
    """Expand once for its mistakes alone; returns the number of jobs."""
    return sum(1 for _ in expand(campaign, inputs))


def combinations(campaign: Campaign) -> Iterator[Combination]:
    """Rows x zipped lists x product, in the file's order."""
    axes = campaign.axes
    for row in _table(campaign):
        for together in _zipped(axes.zipped):
            for values in itertools.product(*axes.product.values()):
                own = (*together, *zip(axes.product, values, strict=True))
                merged = {**(row.values if row else {}), **dict(own)}
                key, line = (row.key, row.line) if row else ("", None)
                yield Combination(row_key=key, line=line, axes=tuple(sorted(own)), values=merged)


def _table(campaign: Campaign) -> Iterable[tables.Row | None]:
    return tables.read(campaign.axes.rows, campaign.folder) if campaign.axes.rows else (None,)


def _zipped(lists: Mapping[str, list[Any]]) -> Iterator[tuple[tuple[str, Any], ...]]:
    if not lists:
        yield ()
    for values in zip(*lists.values(), strict=True):
        yield tuple(zip(lists, values, strict=True))


def _seeds(seeds: SeedRange | list[int]) -> Iterable[int]:
    return range(seeds.start, seeds.start + seeds.count) if isinstance(seeds, SeedRange) else seeds


@dataclass(frozen=True, slots=True)
class _Made:
    """What children need to know of a job of this chain."""

    identity: str
    fingerprint: str
    width: int
    height: int
    fanned: Mapping[str, int]


@dataclass(slots=True)
class _Expander:
    campaign: Campaign
    inputs: InputFolder
    mistakes: list[Mistake] = field(default_factory=list)
    _stages: list[_StagePlan] = field(init=False)

    def __post_init__(self) -> None:
        depths: dict[str, int] = {}
        self._stages = []
        for stage in self.campaign.stage_order():
            depths[stage.id] = 1 + max((depths[parent] for parent in parents_of(stage)), default=-1)
            self._stages.append(_StagePlan(self.campaign, stage, depths[stage.id]))

    def chain(self, combination: Combination, seed: int) -> Iterator[JobSpec]:
        """All jobs of one combination and root seed."""
        made: dict[str, list[_Made]] = {}
        for plan in self._stages:
            made[plan.stage.id] = []
            parent_ids = parents_of(plan.stage)
            if any(not made[parent] for parent in parent_ids):
                continue
            for parents in itertools.product(*(made[parent] for parent in parent_ids)):
                inherited = _agreed(parents)
                if inherited is None:
                    continue
                for fanned in plan.fan_out(inherited):
                    spec = self._job(plan, combination, seed, fanned, dict(zip(parent_ids, parents, strict=True)))
                    if spec is None:
                        return
                    made[plan.stage.id].append(plan.made(spec, fanned))
                    yield spec

    def _job(
        self,
        plan: _StagePlan,
        combination: Combination,
        seed: int,
        fanned: Mapping[str, int],
        parents: Mapping[str, _Made],
    ) -> JobSpec | None:
        try:
            return plan.job(combination, seed, fanned, parents, self.inputs)
        except _WrongValueError as wrong:
            mistake = self.campaign.source.mistake(wrong.path, str(wrong), wrong.fix)
            if combination.line is not None and self.campaign.axes.rows:
                where = f"{mistake.message} [{self.campaign.axes.rows.file}:{combination.line}]"
                mistake = self.campaign.source.mistake(wrong.path, where, wrong.fix)
            if mistake not in self.mistakes:
                self.mistakes.append(mistake)
            return None


def _agreed(parents: Iterable[_Made]) -> Mapping[str, int] | None:
    """The fan-out seeds the parents came with, or None where a join would mix two branches of one fan-out."""
    merged: dict[str, int] = {}
    for parent in parents:
        if any(merged.get(stage, seed) != seed for stage, seed in parent.fanned.items()):
            return None
        merged |= parent.fanned
    return merged


class _WrongValueError(ValueError):
    """A value that only expansion shows to be wrong."""

    def __init__(self, path: KeyPath, message: str, fix: str | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.fix = fix


class _StagePlan:
    """One stage with its templates compiled and its checkpoints resolved."""

    def __init__(self, campaign: Campaign, stage: Stage, depth: int) -> None:
        self.stage = stage
        self.depth = depth
        self.path: KeyPath = ("stages", campaign.spec.stages.index(stage))
        self.files: CheckpointFiles = campaign.catalog[stage.checkpoint or campaign.spec.checkpoint]
        self.family = families.family(self.files.family)
        cell = self.family.cell(stage.task, controlnets=len(stage.controlnets))
        if cell is None:
            raise AssertionError(f"{stage.task} was checked at load")
        self.cell = cell
        self.checkpoint = CheckpointRef(alias=self.files.alias, digest=self.files.digest)
        self.controlnets = [campaign.catalog[use.checkpoint] for use in stage.controlnets]
        output = stage.output or campaign.spec.output
        self.output = OutputFormat(format=output.format, quality=output.quality)
        self._parameters = {
            name: _own_or_default(stage, campaign.spec.defaults, name, self.path) for name in Parameters.model_fields
        }
        self.prompt = compile_template(stage.prompt)

    def fan_out(self, inherited: Mapping[str, int]) -> Iterator[Mapping[str, int]]:
        """One entry per job: the fan-out seeds of the stages above, and this stage's own where it has ``seeds:``."""
        if self.stage.seeds is None:
            yield inherited
            return
        for seed in _seeds(self.stage.seeds):
            yield {**inherited, self.stage.id: seed}

    def noise_seed(self, root: int, fanned: Mapping[str, int]) -> int:
        """Roots use the seed as written, later stages one derived from it, unless the file says otherwise."""
        if self.stage.id in fanned:
            return fanned[self.stage.id]
        if self.stage.seed == "same" or self.depth == 0:
            return root
        return stage_seed(root, "/".join([self.stage.id, *(str(fanned[stage]) for stage in sorted(fanned))]))

    def made(self, spec: JobSpec, fanned: Mapping[str, int]) -> _Made:
        """What the stages below need to know of a job of this stage."""
        width, height = spec.request.width * self.files.scale, spec.request.height * self.files.scale
        return _Made(spec.identity, spec.fingerprint, width, height, fanned)

    def job(
        self,
        combination: Combination,
        seed: int,
        fanned: Mapping[str, int],
        parents: Mapping[str, _Made],
        inputs: InputFolder,
    ) -> JobSpec:
        """One job of this stage; raises _WrongValueError where a value does not fit."""
        used: dict[str, Any] = {}
        resolver = _Resolver(self, combination.values, parents, inputs, used)
        request = resolver.request(self.noise_seed(seed, fanned))
        axes = (*combination.axes, *((f"{stage}.seed", own) for stage, own in sorted(fanned.items())))
        return JobSpec(
            stage=self.stage.id,
            depth=self.depth,
            row_key=combination.row_key,
            variables=tuple(sorted({**dict(axes), **used}.items())),
            axes=axes,
            seed=seed,
            request=request,
            fingerprint=fingerprint(request),
            batch_key=batch_key(request),
            parents=tuple((stage, made.identity) for stage, made in parents.items()),
        )

    def parameter(self, name: str) -> tuple[KeyPath, Any]:
        """The stage's value or the campaign's default, with its place."""
        return self._parameters[name]


def _own_or_default(stage: Stage, defaults: Parameters, name: str, path: KeyPath) -> tuple[KeyPath, Any]:
    own = getattr(stage, name)
    place, value = ((*path, name), own) if own is not None else (("defaults", name), getattr(defaults, name))
    return place, compile_template(value) if isinstance(value, str) else value


@dataclass(slots=True)
class _Resolver:
    """One job's request from its values."""

    plan: _StagePlan
    values: Mapping[str, Any]
    parents: Mapping[str, _Made]
    inputs: InputFolder
    used: dict[str, Any]

    def request(self, seed: int) -> GenerationRequest:
        plan, stage = self.plan, self.plan.stage
        image, size = self._image(stage.image, "image")
        mask, mask_size = self._image(stage.mask_image, "mask_image")
        controls = [self._control(n, use) for n, use in enumerate(stage.controlnets)]
        width, height = self._size(size or next((size for _, size in controls), None))
        resize = self._text("resize")
        for role, given in (("image", size), ("mask_image", mask_size), *(("controlnets", s) for _, s in controls)):
            self._check_fit(role, given, (width, height), resize)
        prompt = self._render((*plan.path, "prompt"), plan.prompt)
        return GenerationRequest(
            task=stage.task,
            checkpoint=plan.checkpoint,
            prompt=str(prompt),
            negative_prompt=(self._text("negative_prompt") or "") if plan.family.negative_prompt else "",
            seed=seed,
            width=width,
            height=height,
            num_inference_steps=int(self._number("num_inference_steps", plan.family.num_inference_steps)),
            guidance_scale=float(self._number("guidance_scale", plan.family.guidance_scale)),
            scheduler=self._scheduler(),
            strength=self._strength(),
            image=image,
            mask_image=mask,
            controlnets=tuple(use for use, _ in controls),
            clip_skip=self._optional("clip_skip", allowed=plan.family.clip_skip),
            noise_level=self._optional("noise_level", allowed=plan.family.noise_level is not None),
            resize=resize,
            output=plan.output,
        )

    def _render(self, path: KeyPath, template: Template) -> Any:
        try:
            value = template.render(self.values)
        except TemplateRefusedError as error:
            raise _WrongValueError(path, str(error)) from error
        for name in template.names:
            self.used[name] = self.values[name]
        return value

    def _value(self, name: str) -> tuple[KeyPath, Any]:
        path, value = self.plan.parameter(name)
        return path, self._render(path, value) if isinstance(value, Template) else value

    def _text(self, name: str) -> str | None:
        _, value = self._value(name)
        return None if value is None else str(value)

    def _number(self, name: str, default: float | None) -> float | int:
        path, value = self._value(name)
        if value is None:
            if default is None:
                raise _WrongValueError(path, "is missing", "add it")
            return default
        try:
            return number(name, value)
        except ValueError as error:
            raise _WrongValueError(path, str(error)) from error

    def _optional(self, name: str, *, allowed: bool) -> int | None:
        path, value = self._value(name)
        if value is None:
            return None
        if not allowed:
            if path[0] == "defaults":
                return None
            raise _WrongValueError(path, f"{self.plan.family.title} does not take it", "remove it")
        return int(self._number(name, None))

    def _strength(self) -> float | None:
        if self.plan.cell.strength is None:
            path, value = self._value("strength")
            if value is not None and path[0] != "defaults":
                raise _WrongValueError(path, f"{self.plan.stage.task} does not take it", "remove it")
            return None
        strength = float(self._number("strength", self.plan.cell.strength))
        steps = int(self._number("num_inference_steps", self.plan.family.num_inference_steps))
        if int(steps * strength) < 1:
            raise _WrongValueError(
                self._value("strength")[0], f"{strength:g} of {steps} steps is no step", "raise one of them"
            )
        return strength

    def _scheduler(self) -> str:
        path, value = self._value("scheduler")
        if value is None:
            return self.plan.family.scheduler
        why = families.scheduler_refusal(self.plan.family.name, str(value))
        if why and path[0] == "defaults" and str(value) in families.SCHEDULERS:
            # A default applies where the task takes it: an upscaler beside an SD 1.x stage keeps its own.
            return self.plan.family.scheduler
        if why:
            raise _WrongValueError(path, why)
        return str(value)

    def _size(self, given: tuple[int, int] | None) -> tuple[int, int]:
        """What the stage says; for super-resolution what comes in; else the defaults."""
        if self.plan.stage.task is Task.SUPER_RESOLUTION and given:
            return given
        fallback = given or (DEFAULT_SIDE, DEFAULT_SIDE)
        size = int(self._number("width", fallback[0])), int(self._number("height", fallback[1]))
        multiple = self.plan.family.size_multiple
        for name, side in zip(("width", "height"), size, strict=True):
            if side % multiple:
                near = max(multiple, round(side / multiple) * multiple)
                raise _WrongValueError(self._value(name)[0], f"{side} is not a multiple of {multiple}", f"write {near}")
        return size

    def _check_fit(self, role: str, given: tuple[int, int] | None, wanted: tuple[int, int], resize: str | None) -> None:
        if given is not None and given != wanted and resize is None:
            message = f"the picture is {given[0]}x{given[1]}, the stage makes {wanted[0]}x{wanted[1]}"
            modes = ", ".join(conditioning.RESIZE_MODES)
            raise _WrongValueError(
                (*self.plan.path, role), message, f"add resize: ({modes}) or change width and height"
            )

    def _control(self, n: int, use: ControlNetSpec) -> tuple[ControlNetInput, tuple[int, int] | None]:
        path: KeyPath = (*self.plan.path, "controlnets", n)
        source, size = self._source(use.image, (*path, "image"))
        scale = use.controlnet_conditioning_scale
        if isinstance(scale, str):
            scale = self._render((*path, "controlnet_conditioning_scale"), compile_template(scale))
        try:
            scale = number("controlnet_conditioning_scale", scale)
        except ValueError as error:
            raise _WrongValueError((*path, "controlnet_conditioning_scale"), str(error)) from error
        files = self.plan.controlnets[n]
        control = ControlNetInput(
            checkpoint=CheckpointRef(alias=files.alias, digest=files.digest),
            image=source,
            annotator=use.annotator,
            annotator_parameters=tuple(sorted(use.annotator_parameters.items())),
            controlnet_conditioning_scale=float(scale),
            control_guidance_start=use.control_guidance_start,
            control_guidance_end=use.control_guidance_end,
        )
        return control, size

    def _image(self, spec: ImageSpec | None, key: str) -> tuple[ImageSource | None, tuple[int, int] | None]:
        return (None, None) if spec is None else self._source(spec, (*self.plan.path, key))

    def _source(self, spec: ImageSpec, path: KeyPath) -> tuple[ImageSource, tuple[int, int]]:
        if spec.stage:
            parent = self.parents[spec.stage]
            return ImageSource(stage=spec.stage, digest=parent.fingerprint), (parent.width, parent.height)
        name = str(self._render((*path, "file"), compile_template(spec.file or "")))
        try:
            found = self.inputs.open(name)
        except InputImageError as error:
            raise _WrongValueError((*path, "file"), str(error)) from error
        return ImageSource(digest=found.sha256), (found.width, found.height)
