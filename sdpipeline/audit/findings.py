"""What a verification counts and finds."""

from __future__ import annotations

from dataclasses import dataclass, field

from sdpipeline.domain import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that does not agree: what kind, of what, and how."""

    kind: str
    subject: str
    detail: str


@dataclass(slots=True)
class Verification:
    """What was checked and what was found. ``skipped`` counts pictures that ``sample`` left out, ``deleted`` and
    ``erased`` the tombstones: pictures that are gone, and jobs whose requests are.

    ``gaps`` are events that a restored backup lost and ``reconcile --adopt`` told of: named for ever, no fault.
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

    def fault(self, kind: str, subject: str, detail: str) -> None:
        """Note a fault."""
        self.faults.append(Fault(kind=kind, subject=subject, detail=detail))

    def document(self) -> Json:
        """The form of ``audit verify --json``."""
        faults = [{"kind": f.kind, "subject": f.subject, "detail": f.detail} for f in self.faults]
        names = ("events", "seals", "images", "skipped", "unsealed", "deleted", "erased")
        counts = {name: getattr(self, name) for name in names}
        return {"ok": not self.faults} | counts | {"gaps": self.gaps, "faults": faults}
