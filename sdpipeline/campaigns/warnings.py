"""Warnings about a campaign file: what is allowed but probably not meant."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from sdpipeline.campaigns.yaml_source import KeyPath, Located
from sdpipeline.errors import CampaignError, Mistake


@dataclass(slots=True)
class Warnings:
    """Collector of warnings: each kind of warning once per place, however many rows of a table cause it.

    ``row`` is the row that is being filled in, such as ``products.csv:7``; empty without a table.
    """

    source: Located
    row: str = ""
    _found: dict[tuple[KeyPath, Hashable], Mistake] = field(default_factory=dict)

    def add(self, path: KeyPath, kind: Hashable, message: str, fix: str | None = None) -> None:
        """Record a warning at that place in the file, unless it has one of this kind."""
        if (path, kind) not in self._found:
            self._found[path, kind] = self.source.mistake(path, message, fix)

    def in_order(self) -> tuple[Mistake, ...]:
        """Return the warnings in the file's order."""
        found = sorted(self._found.values(), key=lambda warning: (warning.line or 0, warning.column or 0))
        return tuple(found)

    def raise_if_strict(self, *, strict: bool) -> None:
        """Raise CampaignError with all warnings if ``--strict`` makes them errors."""
        if strict and self._found:
            raise CampaignError(*self.in_order())
