"""Result of a verification: counts and faults."""

from __future__ import annotations

from dataclasses import dataclass, field

from sdpipeline.domain import Json

MAX_FAULTS = 1000
"""Limit of listed faults, because a rewritten log has as many faults as events."""

UNREADABLE = (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError, MemoryError)
"""Exceptions raised when a file was not written by this program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One mismatch: its kind, its subject and the detail."""

    kind: str
    subject: str
    detail: str


@dataclass(slots=True)
class Verification:
    """Counts and faults of a verification.

    ``skipped`` counts pictures that ``sample`` left out. ``deleted`` and ``erased`` count the tombstones: deleted
    pictures, and jobs whose requests were erased.

    ``gaps`` are events that a restored backup lost and ``reconcile --adopt`` recorded. They are always listed and are
    not faults. ``signers`` are the public keys that signed, with the number of their seals. Faults beyond
    ``MAX_FAULTS`` are only counted.
    """

    events: int = 0
    seals: int = 0
    images: int = 0
    skipped: int = 0
    unsealed: int = 0
    deleted: int = 0
    erased: int = 0
    faults: list[Fault] = field(default_factory=list)
    gaps: list[Json] = field(default_factory=list)
    signers: dict[str, int] = field(default_factory=dict)
    more_faults: int = 0

    def fault(self, kind: str, subject: str, detail: str) -> None:
        """Add a fault."""
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(Fault(kind=kind, subject=subject, detail=detail))
        else:
            self.more_faults += 1

    def document(self) -> Json:
        """Return the document of ``audit verify --json``."""
        faults = [{"kind": f.kind, "subject": f.subject, "detail": f.detail} for f in self.faults]
        names = ("events", "seals", "images", "skipped", "unsealed", "deleted", "erased")
        counts = {name: getattr(self, name) for name in names}
        keys = [{"public_key": key, "seals": seals} for key, seals in self.signers.items()]
        found = {"gaps": self.gaps, "faults": faults, "more_faults": self.more_faults}
        return {"ok": not self.faults} | counts | {"keys": keys} | found
