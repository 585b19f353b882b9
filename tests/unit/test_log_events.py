"""Every log event has one constant snake_case name and is listed with its level and fields in the reference."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "log-events.md").read_text(encoding="utf-8")
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}


@dataclass(frozen=True)
class LogCall:
    """One structlog call in the source."""

    place: str
    level: str
    event: str
    fields: frozenset[str]

    @property
    def is_constant(self) -> bool:
        return self.event != ""


def _loggers(tree: ast.Module) -> list[ast.Assign]:
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    return [node for node in assigned if ast.unparse(node.value).startswith("structlog.get_logger(")]


def _calls(path: Path) -> Iterator[LogCall]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    loggers = {ast.unparse(made.targets[0]) for made in _loggers(tree)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in LEVELS:
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id in loggers:
            first = node.args[0]
            name = first.value if isinstance(first, ast.Constant) else ""
            place = f"{path.relative_to(ROOT)}:{node.lineno}"
            yield LogCall(place, node.func.attr, str(name), frozenset(str(word.arg) for word in node.keywords))


def _sources() -> list[Path]:
    return sorted(path for top in ("sdpipeline", "flows") for path in (ROOT / top).rglob("*.py"))


CALLS = [call for path in _sources() for call in _calls(path)]


def _row(event: str) -> list[str]:
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{event}` |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_loggers_are_only_made_at_the_top_of_a_module(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("structlog.get_logger(") == len(_loggers(ast.parse(source)))


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.place)
def test_every_event_name_is_a_constant_in_snake_case(call: LogCall) -> None:
    assert re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", call.event)


@pytest.mark.parametrize("call", [call for call in CALLS if call.is_constant], ids=lambda call: call.event)
def test_every_event_stands_in_the_reference_with_its_level_and_fields(call: LogCall) -> None:
    _, level, _, fields = _row(call.event)
    assert call.level in level.split(", ")
    assert [name for name in call.fields if f"`{name}`" not in fields] == []


def test_the_reference_has_no_event_or_field_that_is_never_logged() -> None:
    logged: dict[str, set[str]] = {}
    for call in CALLS:
        logged.setdefault(call.event, set()).update(call.fields)
    for event in re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE):
        assert set(re.findall(r"`(\w+)`", _row(event)[3])) == logged[event]
