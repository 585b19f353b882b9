"""deploy/compose.yaml as a container engine reads it: anchors merged, variables filled in from deploy/.env.example."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from dotenv import dotenv_values

DEPLOY = Path(__file__).parents[2] / "deploy"
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?:(?P<how>:[-?])(?P<rest>[^}]*))?\}")


def variables() -> dict[str, str]:
    """The variables that an operator would copy to deploy/.env."""
    return {name: value or "" for name, value in dotenv_values(DEPLOY / ".env.example").items()}


@cache
def composed() -> Any:
    """The whole document."""
    return yaml.safe_load(_VARIABLE.sub(_value, (DEPLOY / "compose.yaml").read_text()))


def services() -> dict[str, Any]:
    """The services by name."""
    found: dict[str, Any] = composed()["services"]
    return found


def _value(found: re.Match[str]) -> str:
    known = variables().get(found["name"])
    if known is not None:
        return known
    assert found["how"] == ":-", f"{found['name']} has no value in .env.example and no default"
    return str(found["rest"])
