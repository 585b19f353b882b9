"""Variables of a campaign: named lists, lists that advance together, and a table of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from sdpipeline.campaigns.inputs import InputFolder
from sdpipeline.campaigns.spec import CampaignSpec, Rows
from sdpipeline.campaigns.spec_parser import note_faults
from sdpipeline.campaigns.spec_part import Scalar
from sdpipeline.campaigns.tables import Table
from sdpipeline.campaigns.templates import LONGEST_RESULT
from sdpipeline.campaigns.yaml_source import Faults, KeyPath, shown
from sdpipeline.domain import canonical
from sdpipeline.errors import CampaignError, InputImageError, Mistake
from sdpipeline.storage import is_bucket_url
from sdpipeline.suggestions import nearest


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


def parse_variables(spec: CampaignSpec, faults: Faults, inputs: InputFolder, *, online: bool) -> tuple[Axes, bool]:
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
        faults.add(declaration(name, axes), f"the variable {name!r} is declared twice", "rename one")
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
            faults.add(path if isinstance(value, tuple) else (*path, n), f"{what} is listed twice", "remove one")
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
        faults.mistakes.append(Mistake(file=table.name, line=1, message="is empty", fix="add a header line"))
    elif len(set(used)) < len(used) or (table.columns is None and len(variables) < len(titles)):
        message, fix = "has two columns of one name", "rename one, or name the columns you need in columns:"
        faults.mistakes.append(Mistake(file=table.name, line=1, message=message, fix=fix))


def declaration(name: str, axes: Axes) -> KeyPath:
    """Return the place where a variable is declared."""
    if name in axes.product:
        return "variables", name
    return ("variables", "zip", name) if name in axes.zipped else ("variables", "rows", "columns", name)
