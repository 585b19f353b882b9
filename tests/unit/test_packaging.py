"""Requirements in pyproject.toml and pins in constraints.txt."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for lines in extras.values() for line in lines)]
    return [Requirement(line) for line in lines if not line.startswith("sdpipeline[")]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins}


def imported_libraries() -> Iterator[str]:
    for path in [
        *(ROOT / "sdpipeline").rglob("*.py"),
        *(ROOT / "flows").rglob("*.py"),
        *ROOT.glob("migrations/**/*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield node.module.split(".")[0]


def test_constraints_name_no_build_and_no_registry() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert pins
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9.-]+==[0-9][a-z0-9.]*", pin)] == []


def test_every_requirement_has_a_lower_bound() -> None:
    assert [str(r) for r in requirements() if not any(part.operator == ">=" for part in r.specifier)] == []


def test_the_constraints_pin_every_requirement_within_its_bounds() -> None:
    pins = constraints()
    missed = [str(r) for r in requirements() if not r.specifier.contains(pins.get(canonicalize_name(r.name), "0"))]
    assert missed == []


def test_every_library_the_package_imports_is_declared() -> None:
    declared = {canonicalize_name(requirement.name) for requirement in requirements()}
    owners = packages_distributions()
    foreign = set(imported_libraries()) - sys.stdlib_module_names - {"sdpipeline"}
    undeclared = {name for name in foreign if not {canonicalize_name(o) for o in owners.get(name, [])} & declared}
    assert undeclared == set()


def test_planning_and_dispatching_need_no_torch() -> None:
    core = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert core.isdisjoint({"torch", "diffusers", "transformers", "boto3", "psycopg"})
