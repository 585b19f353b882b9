"""Validation of a campaign's stages: order, input pictures, parameters and the capabilities of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdpipeline.campaigns import adapter_validation, controlnet_validation, policy, profiles, prompt_syntax
from sdpipeline.campaigns.learned_defaults import LearnedDefaults, learned_defaults
from sdpipeline.campaigns.parameters import LIMITS, Parameters, number
from sdpipeline.campaigns.policy import Rules
from sdpipeline.campaigns.seeds import Seeds
from sdpipeline.campaigns.spec import CampaignSpec
from sdpipeline.campaigns.stage_plan import WrongValueError, checked, not_taken
from sdpipeline.campaigns.stage_spec import ControlNetSpec, Stage
from sdpipeline.campaigns.yaml_source import Faults, KeyPath
from sdpipeline.domain import Task
from sdpipeline.engine import annotators, families
from sdpipeline.engine.checkpoints import CheckpointFiles
from sdpipeline.engine.families import Cell
from sdpipeline.engine.quality import EDGE_ANNOTATORS
from sdpipeline.engine.union_controlnets import uses_union
from sdpipeline.suggestions import nearest

Catalog = Mapping[str, CheckpointFiles]


def check(spec: CampaignSpec, faults: Faults, catalog: Catalog, policies: Sequence[Rules] = ()) -> None:
    """Note every fault that shows without a variable's value; ``policies`` are the campaign's and the deployment's."""
    if spec.checkpoint not in catalog:
        faults.add(("checkpoint",), f"no checkpoint {spec.checkpoint!r}", nearest(spec.checkpoint, _bases(catalog)))
    _check_seeds(spec.seeds, ("seeds",), faults)
    _check_values(spec.defaults, ("defaults",), faults)
    _check_names(spec, faults)
    _check_quality(spec, faults)
    profiles.check(spec, faults)
    policy.check_words(spec.policy, ("policy",), faults)
    policy.check_safety_checkers(policies, catalog, faults)
    for n, stage in enumerate(spec.stages):
        path: KeyPath = ("stages", n)
        _check_seeds(stage.seeds, (*path, "seeds"), faults)
        if stage.seed and stage.seeds:
            faults.add((*path, "seed"), "has both seed: and seeds:", "keep seed: or seeds:")
        for place, image in stage.images():
            given = [each for each in (image.stage, image.file, image.url) if each is not None]
            if len(given) != 1 and not faults.within((*path, *place)):
                faults.add((*path, *place), "needs exactly one of stage:, file: and url:")
        _check_values(stage, path, faults)
        for m, use in enumerate(stage.controlnets):
            _check_controlnet(use, (*path, "controlnets", m), faults, catalog)
        for place, adapter in stage.adapters():
            if wrong := _wrong("weight", getattr(adapter, "weight", None)):
                faults.add((*path, *place, "weight"), *wrong)
        adapter_validation.check(stage, path, faults, catalog)
        if not faults.has((*path, "task")):
            _check_pictures(stage, path, faults)
            _check_checkpoint(spec, stage, path, faults, catalog, policies=policies)
        if all(alias in catalog for alias in [spec.checkpoint, *stage.aliases()]):
            policy.check_checkpoints(spec, stage, path, faults, policies=policies, catalog=catalog)


def ordered(stages: list[Stage]) -> list[Stage]:
    """Sort stages parents before children, else in the file's order; leave out stages of a cycle."""
    rest, done = list(stages), list[Stage]()
    known: set[str] = set()
    while ready := next((stage for stage in rest if known.issuperset(stage.parents())), None):
        rest = [stage for stage in rest if stage is not ready]
        done.append(ready)
        known.add(ready.id)
    return done


def _bases(catalog: Catalog) -> list[str]:
    return [alias for alias, files in catalog.items() if files.kind == "checkpoint"]


def _check_seeds(seeds: Seeds | None, path: KeyPath, faults: Faults) -> None:
    if isinstance(seeds, list):
        for n, seed in enumerate(seeds):
            if seed in seeds[:n]:
                faults.add((*path, n), f"the seed {seed} is listed twice", "remove one")
    elif seeds is not None and seeds.start + seeds.count - 1 > 2**63 - 1:
        faults.add(path, "goes beyond the largest seed, 9223372036854775807")


def _check_values(part: Parameters, path: KeyPath, faults: Faults) -> None:
    """Note values that are invalid in every model family."""
    for name in Parameters.model_fields:
        if wrong := _wrong(name, getattr(part, name)):
            faults.add((*path, name), *wrong)


def _wrong(name: str, value: Any) -> tuple[str, str | None] | None:
    known = {"scheduler": families.SCHEDULERS, "resize": annotators.RESIZE_MODES}.get(name)
    if value is None or _is_template(value):
        return None
    if known is not None:
        return None if value in known else (f"no {name} {value!r}", nearest(value, known))
    try:
        if name in LIMITS:
            number(name, value)
    except ValueError as error:
        return str(error), None
    return None


def _check_quality(spec: CampaignSpec, faults: Faults) -> None:
    """Refuse an edge agreement threshold without a ControlNet that follows edges."""
    fix = f"add controlnets: with annotator: {' or '.join(EDGE_ANNOTATORS)}, or remove it"
    for n, stage in enumerate(spec.stages):
        if stage.quality and stage.quality.min_edge_agreement is not None and not _follows_edges(stage):
            place: KeyPath = ("stages", n, "quality", "min_edge_agreement")
            faults.add(place, "the stage has no ControlNet that follows edges", fix)
    if spec.quality.min_edge_agreement is not None and not any(_follows_edges(stage) for stage in spec.stages):
        faults.add(("quality", "min_edge_agreement"), "no stage has a ControlNet that follows edges", fix)


def _follows_edges(stage: Stage) -> bool:
    return any(use.annotator in EDGE_ANNOTATORS for use in stage.controlnets)


def _check_names(spec: CampaignSpec, faults: Faults) -> None:
    ids = [stage.id for stage in spec.stages]
    written = [stage.get("id") for stage in faults.source.data["stages"] if isinstance(stage, dict)]
    known = {*ids, *(each for each in written if isinstance(each, str))}
    for n, stage in enumerate(spec.stages):
        if stage.id in ids[:n]:
            faults.add(("stages", n, "id"), f"there are two stages {stage.id!r}", "rename one")
        for place, image in stage.images():
            if image.stage and image.stage not in known:
                path = ("stages", n, *place, "stage")
                faults.add(path, f"no stage {image.stage!r}", nearest(image.stage, set(ids) - {stage.id}))
            elif image.stage == stage.id and ids.count(stage.id) == 1:
                faults.add(("stages", n, *place, "stage"), f"{stage.id!r} cannot use its own picture", "name another")
    _check_cycles(spec, faults)


def _check_cycles(spec: CampaignSpec, faults: Faults) -> None:
    """Note each cycle once, named in full, at its first stage in the file."""
    parents = {stage.id: [parent for parent in stage.parents() if parent != stage.id] for stage in spec.stages}
    reported: set[str] = set()
    for n, stage in enumerate(spec.stages):
        cycle = _cycle(stage.id, parents)
        if cycle and not reported.intersection(cycle):
            reported.update(cycle)
            way = " needs ".join(f"{each!r}" for each in [*cycle, stage.id])
            faults.add(("stages", n), f"is part of a cycle: {way}", "let one of them use another picture")


def _cycle(start: str, parents: Mapping[str, list[str]]) -> list[str] | None:
    """Return the shortest cycle from a stage through its parents; None if there is none."""
    ways, seen = [[start]], set()
    for way in ways:
        for parent in parents.get(way[-1], ()):
            if parent == start:
                return way
            if parent not in seen:
                seen.add(parent)
                ways.append([*way, parent])
    return None


def _is_template(value: Any) -> bool:
    return isinstance(value, str) and "{" in value


def _check_pictures(stage: Stage, path: KeyPath, faults: Faults) -> None:
    wanted = {"image": stage.task is not Task.TEXT_TO_IMAGE, "mask_image": stage.task is Task.INPAINTING}
    for key, needed in wanted.items():
        given = getattr(stage, key) is not None
        if needed and not given:
            fix = f"add {key}: {{stage: ID}}, {{file: PATH}} or {{url: s3://BUCKET/KEY}}"
            faults.add((*path, key), f"{stage.task} needs it", fix)
        if given and not needed:
            faults.add((*path, key), f"{stage.task} does not take it", "remove it")
    if stage.task is Task.TEXT_TO_IMAGE and not stage.prompt:
        faults.add((*path, "prompt"), "text-to-image needs it", "add prompt:")


def _check_checkpoint(
    spec: CampaignSpec, stage: Stage, path: KeyPath, faults: Faults, catalog: Catalog, *, policies: Sequence[Rules]
) -> None:
    """Check that the stage's checkpoint exists and supports the task, then that everything else fits it."""
    own = stage.checkpoint is not None
    alias = stage.checkpoint if stage.checkpoint is not None else spec.checkpoint
    place: KeyPath = (*path, "checkpoint") if own else ("checkpoint",)
    if alias not in catalog:
        if own:
            faults.add(place, f"no checkpoint {alias!r}", nearest(alias, _bases(catalog)))
        return
    base = catalog[alias]
    row = families.FAMILIES.get(base.family)
    if base.kind != "checkpoint" or row is None:
        message = f"{alias!r} is a {base.kind}, which cannot make pictures by itself"
        faults.add(place, message, nearest(alias, _bases(catalog)))
    elif refused := families.task_refusal(base.family, stage.task, controlnets=len(stage.controlnets)):
        faults.add((*path, "task"), refused.message, refused.fix)
    else:
        loras = [catalog[use.checkpoint] for use in stage.loras if use.checkpoint in catalog]
        union = uses_union(catalog.get(use.checkpoint) for use in stage.controlnets)
        cell = row.cell(stage.task, controlnets=len(stage.controlnets), union=union)
        assert cell is not None
        _check_parameters(spec, stage, path, faults, learned_defaults(row, base, loras), cell=cell)
        _check_size(spec, stage, path, faults, scale=base.scale, policies=policies)
        controlnet_validation.check_fit(stage, path, faults, catalog, base=base)
        adapter_validation.check_fit(stage, path, faults, catalog, base=base, row=row)
        profiles.check_fit(stage, path, faults, row)
        prompt_syntax.check_fit(spec, stage, path, faults, row)


def _check_parameters(
    spec: CampaignSpec, stage: Stage, path: KeyPath, faults: Faults, learned: LearnedDefaults, *, cell: Cell
) -> None:
    row = learned.row
    if row.text == "none" and stage.prompt:
        faults.add((*path, "prompt"), f"{row.title} does not take it", "remove it")
    for name in Parameters.model_fields:
        own, default = getattr(stage, name), getattr(spec.defaults, name)
        place: KeyPath = (*path, name) if own is not None else ("defaults", name)
        value = own if own is not None else default
        if refused := not_taken(name, stage, row, cell):
            if own is not None:
                faults.add(place, refused, "remove it")
            continue
        if value is None or _is_template(value) or _wrong(name, value) or (own is None and _spared(name, stage)):
            continue
        try:
            checked(name, value, row)
        except WrongValueError as wrong:
            faults.add(place, str(wrong), wrong.fix)
    if cell.strength is not None:
        _check_steps(spec, stage, path, faults, learned.get("num_inference_steps"))


def _check_size(
    spec: CampaignSpec, stage: Stage, path: KeyPath, faults: Faults, *, scale: int, policies: Sequence[Rules]
) -> None:
    """Check literal sizes; sizes from values or pictures are checked at expansion."""
    for side in ("width", "height"):
        own, default = getattr(stage, side), getattr(spec.defaults, side)
        value = own if own is not None else None if _spared(side, stage) else default
        if value is None or _is_template(value) or _wrong(side, value):
            continue
        for rules in policies:
            if why := rules.size_refusal(side, int(value) * scale):
                faults.add((*path, side) if own is not None else ("defaults", side), *why)


def _spared(name: str, stage: Stage) -> bool:
    """Return True for a default that a stage takes only if it fits."""
    return name == "scheduler" or (stage.task is Task.SUPER_RESOLUTION and name in ("width", "height"))


def _check_steps(spec: CampaignSpec, stage: Stage, path: KeyPath, faults: Faults, default: int) -> None:
    steps: Any = default
    strength: Any = None
    for part in (spec.defaults, stage):
        steps = part.num_inference_steps if part.num_inference_steps is not None else steps
        strength = part.strength if part.strength is not None else strength
    literal = isinstance(steps, int) and isinstance(strength, float | int)
    # Values outside of their limits have been noted already.
    if literal and 0 <= strength <= 1 and steps > 0 and (refused := families.strength_refusal(strength, steps)):
        place: KeyPath = (*path, "strength") if stage.strength is not None else ("defaults", "strength")
        faults.add(place, refused.message, refused.fix)


def _check_controlnet(use: ControlNetSpec, path: KeyPath, faults: Faults, catalog: Catalog) -> None:
    """Note faults of a ControlNet that do not depend on the base checkpoint."""
    known = [alias for alias, files in catalog.items() if files.kind == "controlnet"]
    if use.checkpoint not in known:
        faults.add((*path, "checkpoint"), f"no ControlNet {use.checkpoint!r}", nearest(use.checkpoint, known))
    if use.control_guidance_start >= use.control_guidance_end:
        faults.add((*path, "control_guidance_end"), "is not after control_guidance_start", "raise it")
    if wrong := _wrong("controlnet_conditioning_scale", use.controlnet_conditioning_scale):
        faults.add((*path, "controlnet_conditioning_scale"), *wrong)
    annotator = annotators.ANNOTATORS.get(use.annotator)
    if annotator is None:
        message = f"no annotator {use.annotator!r}"
        faults.add((*path, "annotator"), message, nearest(use.annotator, annotators.ANNOTATORS))
        return
    _check_annotator_checkpoint(use, annotator.learned, path, faults, catalog)
    for name, value in use.annotator_parameters.items():
        place = (*path, "annotator_parameters", name)
        if name not in annotator.parameters:
            faults.add(place, f"{use.annotator!r} does not take it", nearest(name, annotator.parameters))
        elif why := annotator.refusal(use.annotator, name, value):
            faults.add(place, why)


def _check_annotator_checkpoint(
    use: ControlNetSpec, learned: str | None, path: KeyPath, faults: Faults, catalog: Catalog
) -> None:
    place, alias = (*path, "annotator_checkpoint"), use.annotator_checkpoint
    fitting = [files.alias for files in catalog.values() if (files.kind, files.family) == ("annotator", learned)]
    if learned is None:
        if alias is not None:
            faults.add(place, f"annotator {use.annotator!r} does not take it", "remove it")
    elif alias is None:
        faults.add(place, f"annotator {use.annotator!r} needs a checkpoint", nearest("", fitting))
    elif alias not in fitting:
        faults.add(place, f"no {learned} annotator {alias!r}", nearest(alias, fitting))
