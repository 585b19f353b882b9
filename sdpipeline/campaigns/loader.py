"""Loader of campaign files: finds every mistake before anything is written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from sdpipeline.campaigns import schedule, validation, yaml_source
from sdpipeline.campaigns.inputs import InputFolder
from sdpipeline.campaigns.parameters import Parameters
from sdpipeline.campaigns.policy import Rules
from sdpipeline.campaigns.seeds import seed_count
from sdpipeline.campaigns.spec import CampaignSpec
from sdpipeline.campaigns.spec_parser import parse
from sdpipeline.campaigns.stage_plan import Catalog
from sdpipeline.campaigns.stage_spec import Stage
from sdpipeline.campaigns.templates import TemplateRefusedError, compile_template
from sdpipeline.campaigns.variables import Axes, declaration, parse_variables
from sdpipeline.campaigns.warnings import Warnings
from sdpipeline.campaigns.yaml_source import Faults, KeyPath, Located, shown
from sdpipeline.domain import canonical
from sdpipeline.errors import CampaignError, InputImageError
from sdpipeline.storage import is_bucket_url
from sdpipeline.suggestions import nearest, nearest_name

__all__ = ["Campaign", "Catalog", "load"]

MAX_JOBS = 10_000_000
MAX_JOBS_OF_A_CHAIN = 10_000
MAX_PIXELS = 64_000_000
EDITION = "edition"
"""Variable that every template of a campaign with editions may use."""

_IN_BRACES = re.compile(r"\{[{%](.*?)[}%]\}", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """A checked campaign file, ready to expand."""

    spec: CampaignSpec
    axes: Axes
    source: Located
    folder: Path
    catalog: Catalog
    edition: str = ""
    """Name of the edition; empty if the campaign is made once and kept up to date."""
    policies: Sequence[Rules] = ()
    """The campaign's own policy and the deployment's."""
    warnings: Warnings
    """Warnings found so far; those about values of a table are found while it is expanded."""

    @property
    def text(self) -> str:
        """Text of the file as it was read."""
        return self.source.text

    def stage_order(self) -> list[Stage]:
        """Return the stages, parents before children."""
        return validation.ordered(self.spec.stages)


def load(
    path: Path,
    catalog: Catalog,
    inputs: InputFolder | None = None,
    *,
    edition: str | None = None,
    now: datetime | None = None,
    deployment: Rules | None = None,
) -> Campaign:
    """Read and check a campaign file; raises CampaignError holding all mistakes.

    :func:`sdpipeline.campaigns.expand.check` finds mistakes that only show in the values of a table. ``edition`` names
    an edition of the whole campaign; without it a schedule of editions decides which is due at ``now``.
    ``deployment`` is a policy that applies in addition to the file's own.
    """
    folder = path.absolute().parent
    inputs = inputs or InputFolder(folder, max_pixels=MAX_PIXELS)
    return check(yaml_source.load(path), catalog, inputs, edition=edition, now=now, deployment=deployment)


def check(
    source: Located,
    catalog: Catalog,
    inputs: InputFolder,
    *,
    edition: str | None = None,
    now: datetime | None = None,
    deployment: Rules | None = None,
) -> Campaign:
    """Check a parsed document. Buckets are asked only if everything else in the file is right."""
    now = now or datetime.now(UTC)
    look = partial(_checked, source, catalog, inputs, edition=edition, now=now, deployment=deployment)
    found = look(online=False)
    return look(online=True) if _in_buckets(found.spec) else found


def _in_buckets(spec: CampaignSpec) -> bool:
    """Return True if the file names a table or a picture in a bucket without a template."""
    rows = spec.variables.get("rows")
    table = rows.get("file") if isinstance(rows, dict) else None
    urls = [image.url for stage in spec.stages for _, image in stage.images() if image.url and "{" not in image.url]
    return bool(urls) or (table is not None and is_bucket_url(table))


def _checked(
    source: Located,
    catalog: Catalog,
    inputs: InputFolder,
    *,
    edition: str | None,
    now: datetime,
    deployment: Rules | None,
    online: bool,
) -> Campaign:
    faults = Faults(source)
    spec = parse(source.data, faults)
    if spec is None:
        raise CampaignError(*faults.in_order())
    axes, columns_known = parse_variables(spec, faults, inputs, online=online)
    _check_schedule(spec, faults)
    faults.next_phase()
    policies = [Rules(spec.policy), *([deployment] if deployment else [])]
    warnings = Warnings(source)
    validation.check(spec, faults, catalog, policies)
    due = edition if edition is not None else _due(spec, faults, now)
    _check_variables(spec, axes, faults, columns_known=columns_known, edition=due)
    _check_choices(spec, axes, faults, columns_known=columns_known)
    _check_files(spec, faults, inputs, online=online)
    _check_count(spec, axes, faults)
    if faults.mistakes:
        raise CampaignError(*faults.in_order())
    return Campaign(
        spec=spec,
        axes=axes,
        source=source,
        folder=inputs.folder,
        catalog=catalog,
        edition=due,
        policies=policies,
        warnings=warnings,
    )


def template_texts(spec: CampaignSpec) -> Iterator[tuple[KeyPath, str]]:
    """Yield every string that may be a template, with its place."""
    parts: list[tuple[KeyPath, Parameters]] = [(("defaults",), spec.defaults)]
    parts += [(("stages", n), stage) for n, stage in enumerate(spec.stages)]
    if spec.subject is not None:
        yield ("subject",), spec.subject
    for path, part in parts:
        for name in ("prompt", *Parameters.model_fields):
            if isinstance(value := getattr(part, name, None), str):
                yield (*path, name), value
    for n, stage in enumerate(spec.stages):
        for place, image in stage.images():
            for key, text in (("file", image.file), ("url", image.url)):
                if text:
                    yield ("stages", n, *place, key), text
        for m, use in enumerate(stage.controlnets):
            if isinstance(scale := use.controlnet_conditioning_scale, str):
                yield ("stages", n, "controlnets", m, "controlnet_conditioning_scale"), scale
        for place, adapter in stage.adapters():
            if isinstance(weight := getattr(adapter, "weight", None), str):
                yield ("stages", n, *place, "weight"), weight


def _check_schedule(spec: CampaignSpec, faults: Faults) -> None:
    if spec.schedule is None:
        return
    try:
        schedule.check_cron(spec.schedule.cron)
    except schedule.WrongScheduleError as error:
        faults.add(("schedule", "cron"), f"{shown(spec.schedule.cron)} {error}", 'write for example "0 3 * * *"')
    zones = schedule.timezones()
    if spec.schedule.timezone not in zones:
        place, name = ("schedule", "timezone"), spec.schedule.timezone
        faults.add(place, f"no time zone {name!r}", nearest(name, zones))


def _due(spec: CampaignSpec, faults: Faults, now: datetime) -> str:
    """Return the edition that is due by the campaign's schedule."""
    planned = spec.schedule
    if planned is None or planned.mode != "edition" or faults.within(("schedule",)):
        return ""
    return schedule.edition(planned.cron, planned.timezone, now)


def _check_choices(spec: CampaignSpec, axes: Axes, faults: Faults, *, columns_known: bool) -> None:
    """Check that ``exclude`` names existing values and ``include`` names every variable with a list."""
    lists = {**axes.product, **axes.zipped}
    known = {*lists, *axes.columns()}
    for n, choice in enumerate(spec.exclude):
        if not choice and not faults.within(("exclude", n)):
            faults.add(("exclude", n), "names no variable", "write {colour: red}")
        for name, value in choice.items():
            place: KeyPath = ("exclude", n, name)
            if name not in known:
                if columns_known and not faults.within(("variables",)):
                    faults.add(place, f"the variable {name!r} is not declared", nearest(name, known))
            elif name in lists and all(canonical(value) != canonical(each) for each in lists[name]):
                wanted = nearest(str(value), [str(each) for each in lists[name]])
                faults.add(place, f"{name} is never {shown(value)}", wanted)
    for n, choice in enumerate(spec.include):
        for name in choice:
            if name not in lists and not faults.within(("variables",)):
                fix = "a table's columns come from its rows" if name in known else nearest(name, lists)
                faults.add(("include", n, name), f"{name!r} is not a variable with a list of values", fix)
        missing = sorted(set(lists) - set(choice))
        if missing and not faults.within(("variables",)):
            faults.add(("include", n), f"has no value for {', '.join(missing)}", "name every variable with a list")


def _check_variables(spec: CampaignSpec, axes: Axes, faults: Faults, *, columns_known: bool, edition: str) -> None:
    """Check that every template compiles, uses declared variables only, and no declared variable is unused."""
    given = faults.source.data.get("variables")
    declared = {*axes.columns(), *axes.zipped, *axes.product}
    declared |= set(axes.table.columns or ()) if axes.table else set()
    if EDITION in declared:
        faults.add(declaration(EDITION, axes), f"{EDITION!r} is the name of the campaign's edition", "rename it")
    known = declared | set(given if isinstance(given, dict) else ())
    known |= {EDITION} if edition or faults.within(("schedule",)) else set()
    all_known = columns_known and not any(faults.has(path) for path in (("variables",), ("variables", "zip")))
    # A mistake elsewhere may hide a use, so then every word in braces counts as a use.
    used = set(_IN_BRACES.findall(faults.source.text)) if faults.mistakes else set()
    used = {word for text in used for word in re.findall(r"\w+", text)}
    for path, text in template_texts(spec):
        try:
            names = compile_template(text).names
        except TemplateRefusedError as error:
            faults.add(path, str(error))
            used |= set(re.findall(r"\w+", text))
            continue
        used |= names
        for name in sorted(names - known) if all_known else ():
            fix = "add schedule: with mode: edition, or submit --edition NAME" if name == EDITION else ""
            faults.add(path, f"the variable {name!r} is not declared", fix or nearest(name, declared))
            # Do not report the variable it may have meant as unused.
            if (meant := nearest_name(name, declared)) is not None:
                used.add(meant)
    used |= {name for choice in spec.exclude for name in choice}
    if axes.table is not None and axes.table.key is not None:
        # The key distinguishes rows, so its column counts as used.
        used |= {name for name, title in (axes.table.columns or {}).items() if title == axes.table.key}
    open_columns = set() if axes.table is None or axes.table.columns is not None else set(axes.columns())
    for name in sorted(declared - used - open_columns):
        faults.add(declaration(name, axes), f"the variable {name!r} is never used", "use it or remove it")


def _check_files(spec: CampaignSpec, faults: Faults, inputs: InputFolder, *, online: bool) -> None:
    """Check pictures named without a template; pictures named by a row are checked at expansion."""
    for n, stage in enumerate(spec.stages):
        for place, image in stage.images():
            key, name = ("file", image.file) if image.url is None else ("url", image.url)
            path: KeyPath = ("stages", n, *place, key)
            if name is None or image.stage or "{" in name or faults.has(path):
                continue
            try:
                if image.url is None:
                    inputs.open(name)
                elif online:
                    inputs.open_object(name)
                else:
                    inputs.admit(name)
            except InputImageError as error:
                faults.add(path, str(error))


def _check_count(spec: CampaignSpec, axes: Axes, faults: Faults) -> None:
    """Refuse too many jobs: a typo in a count would otherwise keep a database busy for days."""
    if faults.mistakes:
        return
    chain = sum(jobs_of_a_chain(spec).values())
    place: KeyPath = ("stages",)
    if chain > MAX_JOBS_OF_A_CHAIN:
        faults.add(place, f"asks for {chain:,} pictures of one row and seed, at most {MAX_JOBS_OF_A_CHAIN:,}")
    roots = seed_count(spec.seeds)
    combinations = axes.combinations() + len(spec.include)
    total = chain * roots * combinations
    place = ("seeds",) if roots > combinations else ("variables",)
    if total > MAX_JOBS:
        rows = " for each row of its table" if axes.table else ""
        faults.add(place, f"asks for {total:,} pictures{rows}, at most {MAX_JOBS:,}", "split the campaign")


def jobs_of_a_chain(spec: CampaignSpec) -> dict[str, int]:
    """Return the number of jobs of each stage for one row, combination of variables and root seed."""
    fanned: dict[str, set[str]] = {}
    seeds = {stage.id: seed_count(stage.seeds) for stage in spec.stages if stage.seeds is not None}
    for stage in validation.ordered(spec.stages):
        own = {stage.id} if stage.id in seeds else set()
        fanned[stage.id] = own.union(*(fanned[parent] for parent in stage.parents()))
    return {stage: math.prod(seeds[each] for each in sorted(above)) for stage, above in fanned.items()}
