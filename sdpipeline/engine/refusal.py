"""Reason why the engine cannot run a request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Parameter that is refused, the reason, and the fix if there is one."""

    key: str
    message: str
    fix: str | None = None

    def __str__(self) -> str:
        """Return all in one line, as errors of single requests show it."""
        return f"{self.key}: {self.message}" + (f"; {self.fix}" if self.fix else "")
