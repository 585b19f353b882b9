"""Plan of one stage: checks the values of a combination and builds its generation requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring
from typing import Any

from sdpipeline.campaigns import profiles
from sdpipeline.campaigns.checkpoint_rules import rules_of
from sdpipeline.campaigns.inputs import InputFolder
from sdpipeline.campaigns.learned_defaults import learned_defaults
from sdpipeline.campaigns.parameter_warnings import Oddity, negative_prompt_oddity, parameter_oddities
from sdpipeline.campaigns.parameters import LIMITS, Parameters, number
from sdpipeline.campaigns.policy import Rules
from sdpipeline.campaigns.prompt_syntax import ESCAPE, prompt_check
from sdpipeline.campaigns.request_form import Resolved, Shape, Size
from sdpipeline.campaigns.spec import CampaignSpec
from sdpipeline.campaigns.stage_spec import ImageSpec, Stage
from sdpipeline.campaigns.templates import Template, TemplateRefusedError, compile_template
from sdpipeline.campaigns.warnings import Warnings
from sdpipeline.campaigns.yaml_source import KeyPath
from sdpipeline.domain import AdapterInput, CheckpointRef, ImageSource, OutputFormat, Task
from sdpipeline.engine import annotators, families
from sdpipeline.engine.checkpoints import CheckpointFiles, inversion_words
from sdpipeline.engine.families import Cell, Family
from sdpipeline.engine.union_controlnets import mode_number, uses_union
from sdpipeline.engine.weighted_prompts import WeightRefusedError
from sdpipeline.errors import InputImageError
from sdpipeline.suggestions import nearest

DEFAULT_SIDE = 512
"""Width and height if neither the stage, nor ``defaults:``, nor an input picture, nor the checkpoint gives one."""

MAX_SHAPES = 10_000

Catalog = Mapping[str, CheckpointFiles]
"""The checkpoints a campaign may name, by alias."""


class WrongValueError(ValueError):
    """A value is invalid; ``path`` is its place in the campaign file, or the place of a missing key.

    ``of_row`` is False if the value is the same in every row of a table.
    """

    def __init__(self, path: KeyPath, message: str, fix: str | None = None, *, of_row: bool = True) -> None:
        super().__init__(message)
        self.path = path
        self.fix = fix
        self.of_row = of_row


def not_taken(name: str, stage: Stage, family: Family, cell: Cell) -> str | None:
    """Return why this stage does not take that parameter; ``None`` if it does."""
    denoises = family.text != "none"
    taken = {
        "num_inference_steps": denoises,
        "guidance_scale": denoises,
        "scheduler": denoises,
        "strength": cell.strength is not None,
        "negative_prompt": family.negative_prompt,
        "clip_skip": family.clip_skip,
        "noise_level": family.max_noise_level is not None,
        "resize": bool(stage.sized_images()),
    }
    if taken.get(name, True):
        return None
    who = {"strength": str(stage.task), "resize": "a stage without input pictures"}.get(name, family.title)
    return f"{who} does not take it"


def checked(name: str, value: Any, family: Family) -> Any:
    """Convert a parameter's value to its type; raises WrongValueError with an empty path."""
    if name in LIMITS:
        try:
            result = number(name, value)
        except ValueError as error:
            raise WrongValueError((), str(error)) from error
        most = family.max_noise_level
        if name == "noise_level" and most is not None and result > most:
            raise WrongValueError((), f"{result} is more than {most}, the most that {family.title} takes")
        if name in ("width", "height") and (refused := families.size_refusal(family, name, int(result))):
            raise WrongValueError((), refused.message, refused.fix)
        return result
    if name == "scheduler" and (refused := families.scheduler_refusal(family, str(value))):
        raise WrongValueError((), refused.message, refused.fix)
    if name == "resize" and value not in annotators.RESIZE_MODES:
        raise WrongValueError((), f"no mode {value!r}", nearest(str(value), annotators.RESIZE_MODES))
    return str(value)


class StagePlan:
    """A validated stage, with its checkpoints looked up and its templates compiled."""

    def __init__(
        self, spec: CampaignSpec, stage: Stage, catalog: Catalog, policies: Sequence[Rules], warnings: Warnings
    ) -> None:
        self.stage = stage
        self.policies = policies
        self.warnings = warnings
        self.parents = stage.parents()
        self.path: KeyPath = ("stages", spec.stages.index(stage))
        self.files = catalog[stage.checkpoint or spec.checkpoint]
        self.family = families.family(self.files.family)
        self._controlnets = [catalog[use.checkpoint] for use in stage.controlnets]
        union = uses_union(self._controlnets)
        cell = self.family.cell(stage.task, controlnets=len(stage.controlnets), union=union)
        if cell is None:
            raise AssertionError(f"{stage.task} should have been refused when the campaign was loaded")
        self._cell = cell
        self._annotators = [catalog.get(use.annotator_checkpoint or "") for use in stage.controlnets]
        self._adapters = {place: catalog[use.checkpoint] for place, use in stage.adapters()}
        self._learned = learned_defaults(self.family, self.files, [catalog[use.checkpoint] for use in stage.loras])
        self._vae = catalog.get(stage.vae or "")
        self._reproducibility, self._profile = profiles.chosen(spec, stage, self.family)
        self._rules = rules_of(
            self.files, self.family, stage.task, self._profile, vae=self._vae, controlnets=self._controlnets
        )
        self._words = [inversion_words(catalog[use.checkpoint]) for use in stage.textual_inversions]
        output = stage.output or spec.output
        self._output = OutputFormat(format=output.format, quality=output.quality)
        self._parameters = {name: self._parameter(spec, name) for name in Parameters.model_fields}
        self._prompts = prompt_check(spec, stage, self.family, catalog, warnings)
        self._prompt = compile_template(stage.prompt)
        self._negative_path, negative = self._parameters.pop("negative_prompt")
        self._negative = negative if isinstance(negative, Template) else compile_template("")
        scales: dict[KeyPath, Any] = {place: getattr(use, "weight", 1.0) for place, use in stage.adapters()}
        scales |= {("controlnets", n): use.controlnet_conditioning_scale for n, use in enumerate(stage.controlnets)}
        self._scales = {place: _compiled(value) for place, value in scales.items()}
        self._files = {place: compile_template(image.file or image.url or "") for place, image in stage.images()}
        shaping = [value for _, value in self._parameters.values()] + [*self._scales.values(), *self._files.values()]
        self._shaping = _names(shaping)
        self._all_names = _names([*shaping, self._prompt, self._negative])
        self._shapes: dict[tuple[str, tuple[Size, ...]], Shape] = {}

    def resolve(self, values: Mapping[str, Any], sizes: Mapping[str, Size], inputs: InputFolder) -> Resolved:
        """Resolve the stage for one combination; ``sizes`` are the parents'. Raises WrongValueError."""
        # Values that compare equal may be written differently (1, 1.0 and true), so their text is the key.
        key = (repr([values[name] for name in self._shaping]) if self._shaping else "", tuple(sizes.values()))
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shape(values, sizes, inputs)
            if len(self._shapes) >= MAX_SHAPES:
                self._shapes.clear()
            self._shapes[key] = shape
        prompt = self._filled((*self.path, "prompt"), self._prompt, values)
        if not prompt and self.stage.task is Task.TEXT_TO_IMAGE:
            raise WrongValueError((*self.path, "prompt"), "is empty with these values")
        negative = self._filled(self._negative_path, self._negative, values)
        if negative and (odd := negative_prompt_oddity(shape.fixed["guidance_scale"], self._learned)):
            self._warn(self._negative_path, odd)
        words = self._checked_prompt((*self.path, "prompt"), self._prompt, values, prompt)
        self._check_words(words, self._checked_prompt(self._negative_path, self._negative, values, negative))
        return Resolved(
            shape=shape,
            form=shape.form(negative=bool(negative)),
            prompt=prompt,
            negative_prompt=negative,
            used={name: values[name] for name in self._all_names},
            quoted={".prompt": encode_basestring(prompt), ".negative": encode_basestring(negative)},
            blocked=self._denial(prompt, words),
        )

    def _checked_prompt(self, path: KeyPath, template: Template, values: Mapping[str, Any], prompt: str) -> str:
        """Return a prompt's words without syntax, after its checks."""
        try:
            return self._prompts.words(path, template, values, prompt)
        except WeightRefusedError as error:
            raise WrongValueError(path, str(error), ESCAPE, of_row=bool(template.names)) from error

    def _denial(self, prompt: str, words: str) -> str | None:
        """Return the policy rule that forbids the prompt, as it is written or by its words without syntax."""
        if not self.policies:
            return None
        texts = [prompt] if words == prompt else [prompt, words]
        return next(filter(None, (rules.denial(text) for rules in self.policies for text in texts)), None)

    def _check_words(self, *texts: str) -> None:
        """Refuse a textual inversion that no prompt mentions: it would silently have no effect."""
        for n, words in enumerate(self._words):
            if words and not any(word in text for word in words for text in texts):
                path: KeyPath = (*self.path, "textual_inversions", n)
                raise WrongValueError(path, "no prompt mentions it", f"write {words[0]} where it is meant")

    def _place(self, key: str) -> KeyPath:
        """Return the place in the campaign file that gives the stage this value."""
        if key == "checkpoint" and self.stage.checkpoint is None:
            return ("checkpoint",)
        return self._parameters[key][0] if key in self._parameters else (*self.path, key)

    def _parameter(self, spec: CampaignSpec, name: str) -> tuple[KeyPath, Any]:
        """Return the stage's own value, else the default if the stage takes it, with its place in the file."""
        own, default = getattr(self.stage, name), getattr(spec.defaults, name)
        if own is not None:
            return (*self.path, name), _compiled(own)
        if default is None or not_taken(name, self.stage, self.family, self._cell):
            return (*self.path, name), None
        if name in ("width", "height") and self.stage.task is Task.SUPER_RESOLUTION:
            # Its width and height are those of the input picture.
            return (*self.path, name), None
        return ("defaults", name), _compiled(default)

    def _shape(self, values: Mapping[str, Any], sizes: Mapping[str, Size], inputs: InputFolder) -> Shape:
        stage = self.stage
        sources, given = {}, {}
        for place, image in stage.images():
            sources[place], given[place] = self._source(place, image, values, sizes, inputs)
        sized = {place: given[place] for place in stage.sized_images()}
        width, height = self._size(values, next(iter(sized.values()), None))
        resize = self._value("resize", values)
        for place, size in sized.items():
            if size != (width, height) and resize is None:
                message = f"the picture is {size[0]}x{size[1]}, but the stage uses {width}x{height}"
                fix = f"add resize: ({', '.join(annotators.RESIZE_MODES)}) or change width and height"
                raise WrongValueError((*self.path, *place), message, fix)
        steps = self._value("num_inference_steps", values, self._learned.get("num_inference_steps"))
        scheduler = self._value("scheduler", values, self._learned.get("scheduler"))
        if refused := self._rules.refusal(scheduler, steps, width, height):
            raise WrongValueError(self._place(refused.key), refused.message, refused.fix)
        fixed = {
            "task": stage.task,
            "checkpoint": _ref(self.files),
            "width": width,
            "height": height,
            "num_inference_steps": steps,
            "guidance_scale": self._value("guidance_scale", values, self._learned.get("guidance_scale")),
            "scheduler": scheduler,
            "strength": self._strength(values, steps),
            "clip_skip": self._value("clip_skip", values, self._learned.get("clip_skip")),
            "noise_level": self._value("noise_level", values),
            "resize": resize,
            "loras": tuple(self._adapter(("loras", n), values) for n in range(len(stage.loras))),
            "textual_inversions": tuple(
                self._adapter(("textual_inversions", n), values) for n in range(len(stage.textual_inversions))
            ),
            "vae": _ref(self._vae) if self._vae else None,
            "reproducibility": self._reproducibility,
            "profile": self._profile,
            "prompt_syntax": self._prompts.syntax,
            "output": self._output,
        }
        images = {str(place[0]): source for place, source in sources.items() if len(place) == 1}
        controlnets = tuple(
            self._controlnet(n, sources["controlnets", n, "image"], values) for n in range(len(stage.controlnets))
        )
        ip_adapters = tuple(
            self._adapter(("ip_adapters", n), values, sources["ip_adapters", n, "image"])
            for n in range(len(stage.ip_adapters))
        )
        for odd in parameter_oddities(stage.task, fixed, self._learned):
            self._warn(self._parameters[odd.name][0], odd)
        result = self._result((width, height), inputs.max_pixels)
        return Shape(fixed=fixed, images=images, controlnets=controlnets, ip_adapters=ip_adapters, result=result)

    def _warn(self, path: KeyPath, odd: Oddity) -> None:
        """Warn once of this parameter of this stage, at its own place or at that of the campaign's default."""
        stage = f" (stage {self.stage.id!r})" if path[0] == "defaults" else ""
        self.warnings.add(path, (self.stage.id, odd.name), f"{odd.message}{stage}", odd.fix)

    def _value(self, name: str, values: Mapping[str, Any], otherwise: Any = None) -> Any:
        path, value = self._parameters[name]
        if isinstance(value, Template):
            value = self._filled(path, value, values, keep_type=True)
        if value is None:
            return otherwise
        if name == "scheduler" and path[0] == "defaults" and value in families.SCHEDULERS:
            # A default applies only if the family supports it: an upscaler after an SD 1.x stage keeps its own.
            return value if value in self.family.schedulers else otherwise
        try:
            return checked(name, value, self.family)
        except WrongValueError as wrong:
            raise WrongValueError(path, str(wrong), wrong.fix) from wrong

    def _filled(self, path: KeyPath, template: Template, values: Mapping[str, Any], *, keep_type: bool = False) -> Any:
        try:
            value = template.render(values)
        except TemplateRefusedError as error:
            raise WrongValueError(path, str(error)) from error
        return value if keep_type else str(value)

    def _strength(self, values: Mapping[str, Any], steps: int) -> float | None:
        if self._cell.strength is None:
            return None
        strength = float(self._value("strength", values, self._cell.strength))
        if refused := families.strength_refusal(strength, steps):
            raise WrongValueError(self._parameters["strength"][0], refused.message, refused.fix)
        return strength

    def _size(self, values: Mapping[str, Any], given: Size | None) -> Size:
        """Return the size by the stage, else by the defaults, else of the first input picture, else the native one."""
        fallback = given or self._learned.size(DEFAULT_SIDE)
        size = self._value("width", values, fallback[0]), self._value("height", values, fallback[1])
        multiple = self.family.size_multiple
        if any(families.size_refusal(self.family, "width", side) for side in size):
            near = [max(multiple, side // multiple * multiple) for side in size]
            message = f"the picture is {size[0]}x{size[1]}, and {self.family.title} needs multiples of {multiple}"
            fix = f"write width: {near[0]}, height: {near[1]} and resize: crop"
            raise WrongValueError((*self.path, "width"), message, fix)
        return size

    def _result(self, size: Size, max_pixels: int) -> Size:
        width, height = size[0] * self.files.scale, size[1] * self.files.scale
        if width * height > max_pixels:
            message = f"makes a picture of {width}x{height}, more than {max_pixels:,} pixels"
            raise WrongValueError((*self.path, "width"), message, "make it smaller or raise SDP_INPUTS__MAX_PIXELS")
        for side, pixels in (("width", width), ("height", height)):
            for rules in self.policies:
                if why := rules.size_refusal(side, pixels):
                    raise WrongValueError(self._parameters[side][0], *why)
        return width, height

    def _source(
        self,
        place: KeyPath,
        image: ImageSpec,
        values: Mapping[str, Any],
        sizes: Mapping[str, Size],
        inputs: InputFolder,
    ) -> tuple[ImageSource, Size]:
        if image.stage:
            return ImageSource(stage=image.stage, digest=""), sizes[image.stage]
        path = (*self.path, *place, "file" if image.url is None else "url")
        name = self._filled(path, self._files[place], values)
        try:
            if image.url is None:
                file = inputs.open(name)
                return ImageSource(digest=file.sha256), (file.width, file.height)
            found = inputs.open_object(name)
        except InputImageError as error:
            raise WrongValueError(path, str(error)) from error
        return ImageSource(digest=found.sha256, url=found.url, version=found.version), (found.width, found.height)

    def _controlnet(self, n: int, image: ImageSource, values: Mapping[str, Any]) -> Mapping[str, Any]:
        use, files = self.stage.controlnets[n], self._controlnets[n]
        learned = self._annotators[n]
        return {
            "checkpoint": _ref(files),
            "image": image,
            "annotator": use.annotator,
            "annotator_parameters": tuple(sorted(use.annotator_parameters.items())),
            "annotator_checkpoint": learned and _ref(learned),
            "controlnet_conditioning_scale": self._scale(("controlnets", n), "controlnet_conditioning_scale", values),
            "control_guidance_start": use.control_guidance_start,
            "control_guidance_end": use.control_guidance_end,
            "control_mode": None if use.control_mode is None else mode_number(files.family, use.control_mode),
        }

    def _adapter(self, place: KeyPath, values: Mapping[str, Any], image: ImageSource | None = None) -> AdapterInput:
        weight = self._scale(place, "weight", values)
        return AdapterInput(checkpoint=_ref(self._adapters[place]), weight=weight, image=image)

    def _scale(self, place: KeyPath, name: str, values: Mapping[str, Any]) -> float:
        path, scale = (*self.path, *place, name), self._scales[place]
        scale = self._filled(path, scale, values, keep_type=True) if isinstance(scale, Template) else scale
        try:
            return float(number(name, scale))
        except ValueError as error:
            raise WrongValueError(path, str(error)) from error


def _ref(files: CheckpointFiles) -> CheckpointRef:
    return CheckpointRef(alias=files.alias, digest=files.digest)


def _compiled(value: Any) -> Any:
    return compile_template(value) if isinstance(value, str) else value


def _names(values: list[Any]) -> list[str]:
    return sorted({name for value in values if isinstance(value, Template) for name in value.names})
