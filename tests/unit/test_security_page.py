"""The table of threats in deploy/SECURITY.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "deploy" / "SECURITY.md").read_text(encoding="utf-8")
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"::(test_\w+)", PAGE))))
def test_every_named_test_exists(name: str) -> None:
    assert f"def {name}(" in TESTS


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\b(?:tests/\w+/)?(test_\w+)\.py", PAGE))))
def test_every_named_file_exists(name: str) -> None:
    assert list((ROOT / "tests").rglob(f"{name}.py"))
