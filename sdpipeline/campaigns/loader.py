"""Loader of campaign files: finds every mistake before anything is written."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdpipeline.campaigns import schedule, validation, yaml_source
from sdpipeline.campaigns.inputs import InputFolder
from sdpipeline.campaigns.policy import Rules
from sdpipeline.campaigns.spec import (
    NAME,
    CampaignSpec,
    Parameters,
    Rows,
    Scalar,
    SeedRange,
    Stage,
    nearest,
    note_faults,
    parse,
    shown,
)
from sdpipeline.campaigns.stage_plan import Catalog
from sdpipeline.campaigns.tables import Table
from sdpipeline.campaigns.templates import LONGEST_RESULT, TemplateRefusedError, compile_template
from sdpipeline.campaigns.yaml_source import Faults, KeyPath, Located
from sdpipeline.domain import canonical
from sdpipeline.errors import CampaignError, InputImageError, Mistake
from sdpipeline.storage import is_bucket_url

__all__ = ["NAME", "Campaign", "Catalog", "load", "nearest"]

MOST_JOBS = 10_000_000
MOST_JOBS_OF_A_CHAIN = 10_000
MAX_PIXELS = 64_000_000
EDITION = "edition"
"""Variable that every template of a campaign with editions may use."""

_IN_BRACES = re.compile(r"\{[{%](.*?)[}%]\}", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Parsed ``variables:``: named lists that multiply, lists that advance together, and a table."""

    product: Mapping[str, list[Scalar]] = field(default_factory=dict)
    zipped: Mapping[str, list[Scalar]] = field(default_factory=dict)
    table: Table | None = None
    titles: Sequence[str] = ()

    def columns(self) -> Mapping[str, int]:
        """Return the table's variables with their column numbers."""
        return self.table.variables(list(self.titles)) if self.table else {}

    def combinations(self) -> int:
        """Return the number of combinations for each row of the table."""
        together = len(next(iter(self.zipped.values()))) if self.zipped else 1
        return together * math.prod(len(values) for values in self.product.values())


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
    axes, columns_known = _axes(spec, faults, inputs, online=online)
    _check_schedule(spec, faults)
    faults.next_phase()
    policies = [Rules(spec.policy), *([deployment] if deployment else [])]
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


def _axes(spec: CampaignSpec, faults: Faults, inputs: InputFolder, *, online: bool) -> tuple[Axes, bool]:
    """Parse the variables; also return True if all their names are known despite possible mistakes."""
    product: dict[str, list[Scalar]] = {}
    zipped: dict[str, list[Scalar]] = {}
    axes, known = Axes(), True
    for name, value in spec.variables.items():
        path: KeyPath = ("variables", name)
        if name == "rows":
            axes, known = _table(value, path, faults, inputs, online=online)
        elif name == "zip":
            if isinstance(value, dict):
                zipped = {each: _values(items, (*path, each), faults) for each, items in value.items()}
            else:
                faults.add(path, f"found {shown(value)}, expected names with lists", "write {colour: [red, blue]}")
        else:
            product[name] = _values(value, path, faults)
            _check_repeats(product[name], path, faults)
    if len({len(items) for items in zipped.values()}) > 1:
        lengths = ", ".join(f"{name} has {len(items)}" for name, items in zipped.items())
        faults.add(("variables", "zip"), f"its lists have different lengths: {lengths}", "make them equal")
    _check_repeats(list(zip(*zipped.values(), strict=False)), ("variables", "zip"), faults)
    axes = Axes(product=product, zipped=zipped, table=axes.table, titles=axes.titles)
    taken = [*product, *zipped, *axes.columns()]
    for name in sorted({name for name in taken if taken.count(name) > 1}):
        faults.add(_declaration(name, axes), f"the variable {name!r} is declared twice", "rename one")
    return axes, known


def _values(given: Any, path: KeyPath, faults: Faults) -> list[Scalar]:
    if not isinstance(given, list) or not given:
        faults.add(path, f"found {shown(given) if given != [] else 'an empty list'}, expected a list of values")
        return []
    for n, value in enumerate(given):
        if not isinstance(value, Scalar):
            faults.add((*path, n), f"found {shown(value)}, expected a text, a number, true or false")
        elif isinstance(value, str) and len(value) > LONGEST_RESULT:
            faults.add((*path, n), f"is longer than {LONGEST_RESULT:,} characters", "shorten it")
    return given


def _check_repeats(values: Sequence[Any], path: KeyPath, faults: Faults) -> None:
    """Refuse equal values, which would ask for the same job twice."""
    seen = set()
    for n, value in enumerate(values):
        text = canonical(value)
        if text in seen:
            what = " with ".join(shown(each) for each in value) if isinstance(value, tuple) else shown(value)
            faults.add(path if isinstance(value, tuple) else (*path, n), f"{what} is there twice", "remove one")
        seen.add(text)


def _table(given: Any, path: KeyPath, faults: Faults, inputs: InputFolder, *, online: bool) -> tuple[Axes, bool]:
    """Open the table and return its axes; also return True if its columns are known."""
    try:
        rows = Rows.model_validate(given)
    except ValidationError as error:
        note_faults(error, given, path, faults)
        return Axes(), False
    if (rows.file is None) == (rows.files is None):
        faults.add(path, "needs file: or files:, and not both")
        return Axes(), False
    if rows.files is not None and rows.key is not None:
        faults.add((*path, "key"), "files are known by their path", "remove it")
        return Axes(), False
    try:
        if rows.file is not None and is_bucket_url(rows.file) and not online:
            inputs.admit(rows.file)
            return Axes(), False
        table = _opened(rows, inputs)
        titles = table.titles()
    except InputImageError as error:
        faults.add((*path, "file" if rows.file is not None else "files"), str(error))
        return Axes(), False
    except CampaignError as error:
        faults.mistakes += error.mistakes
        return Axes(), False
    wanted = {(*path, "columns", name): title for name, title in (rows.columns or {}).items()}
    wanted |= {(*path, "key"): rows.key} if rows.key is not None else {}
    for place, title in wanted.items():
        if title not in titles:
            faults.add(place, f"no column {title!r} in {table.name}", nearest(title, titles))
    _check_titles(table, titles, faults)
    axes = Axes(table=table, titles=titles)
    return axes, True


def _opened(rows: Rows, inputs: InputFolder) -> Table:
    if rows.files is not None:
        files = inputs.matching(rows.files)
        return Table(path=inputs.folder, name=rows.files, key="path", columns=rows.columns, files=files)
    name = rows.file or ""
    return Table(path=inputs.table(name), name=name, key=rows.key, columns=rows.columns)


def _check_titles(table: Table, titles: list[str], faults: Faults) -> None:
    variables = list(table.variables(titles)) if titles else []
    asked = [*(table.columns or {}).values(), *([table.key] if table.key else [])]
    used = [title for title in titles if title in asked] if table.columns is not None else titles
    if not titles:
        faults.mistakes.append(Mistake(file=table.name, line=1, message="is empty", fix="give it a line of titles"))
    elif len(set(used)) < len(used) or (table.columns is None and len(variables) < len(titles)):
        message, fix = "has two columns of one name", "rename one, or name the columns you need in columns:"
        faults.mistakes.append(Mistake(file=table.name, line=1, message=message, fix=fix))


def _declaration(name: str, axes: Axes) -> KeyPath:
    if name in axes.product:
        return "variables", name
    return ("variables", "zip", name) if name in axes.zipped else ("variables", "rows", "columns", name)


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
                faults.add(("include", n, name), f"{name!r} is no variable with a list of values", fix)
        missing = sorted(set(lists) - set(choice))
        if missing and not faults.within(("variables",)):
            faults.add(("include", n), f"says no value for {', '.join(missing)}", "name every variable with a list")


def _check_variables(spec: CampaignSpec, axes: Axes, faults: Faults, *, columns_known: bool, edition: str) -> None:
    """Check that every template compiles, uses declared variables only, and no declared variable is unused."""
    given = faults.source.data.get("variables")
    declared = {*axes.columns(), *axes.zipped, *axes.product}
    declared |= set(axes.table.columns or ()) if axes.table else set()
    if EDITION in declared:
        faults.add(_declaration(EDITION, axes), f"{EDITION!r} is the name of the campaign's edition", "rename it")
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
            used |= set(difflib.get_close_matches(name, declared, n=1))
    used |= {name for choice in spec.exclude for name in choice}
    if axes.table is not None and axes.table.key is not None:
        # The key distinguishes rows, so its column counts as used.
        used |= {name for name, title in (axes.table.columns or {}).items() if title == axes.table.key}
    open_columns = set() if axes.table is None or axes.table.columns is not None else set(axes.columns())
    for name in sorted(declared - used - open_columns):
        faults.add(_declaration(name, axes), f"the variable {name!r} is used nowhere", "use it or remove it")


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
    if chain > MOST_JOBS_OF_A_CHAIN:
        faults.add(place, f"asks for {chain:,} pictures of one row and seed, at most {MOST_JOBS_OF_A_CHAIN:,}")
    roots = seed_count(spec.seeds)
    combinations = axes.combinations() + len(spec.include)
    total = chain * roots * combinations
    place = ("seeds",) if roots > combinations else ("variables",)
    if total > MOST_JOBS:
        rows = " for each row of its table" if axes.table else ""
        faults.add(place, f"asks for {total:,} pictures{rows}, at most {MOST_JOBS:,}", "split the campaign")


def jobs_of_a_chain(spec: CampaignSpec) -> dict[str, int]:
    """Return the number of jobs of each stage for one row, combination of variables and root seed."""
    fanned: dict[str, set[str]] = {}
    seeds = {stage.id: seed_count(stage.seeds) for stage in spec.stages if stage.seeds is not None}
    for stage in validation.ordered(spec.stages):
        own = {stage.id} if stage.id in seeds else set()
        fanned[stage.id] = own.union(*(fanned[parent] for parent in stage.parents()))
    return {stage: math.prod(seeds[each] for each in sorted(above)) for stage, above in fanned.items()}


def seed_count(seeds: SeedRange | list[int]) -> int:
    """Return the number of seeds."""
    return seeds.count if isinstance(seeds, SeedRange) else len(seeds)
