"""What a verification counts and finds."""

from __future__ import annotations

from dataclasses import dataclass, field

from sdpipeline.domain import Json

MOST_FAULTS = 1000
"""So many are named: a log that was written anew has as many as it has events."""

UNREADABLE = (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError, MemoryError)
"""What reading somebody's file raises where it is not what was written here."""


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
    ``signers`` are the public keys that signed, with the number of their seals. Beyond ``MOST_FAULTS`` faults are only
    counted.
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
        """Note a fault."""
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(Fault(kind=kind, subject=subject, detail=detail))
        else:
            self.more_faults += 1

    def document(self) -> Json:
        """The form of ``audit verify --json``."""
        faults = [{"kind": f.kind, "subject": f.subject, "detail": f.detail} for f in self.faults]
        names = ("events", "seals", "images", "skipped", "unsealed", "deleted", "erased")
        counts = {name: getattr(self, name) for name in names}
        keys = [{"public_key": key, "seals": seals} for key, seals in self.signers.items()]
        found = {"gaps": self.gaps, "faults": faults, "more_faults": self.more_faults}
        return {"ok": not self.faults} | counts | {"keys": keys} | found
