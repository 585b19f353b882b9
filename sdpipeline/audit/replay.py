"""Replay of the events into the expected state of every job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sdpipeline.audit.campaigns import CampaignReplay
from sdpipeline.db import audit_subjects
from sdpipeline.db.audit import Event
from sdpipeline.domain import Json

ALLOWED: Mapping[str | None, tuple[str, ...]] = {
    None: ("waiting", "ready"),
    Event.LEASE_TAKEN: ("leased",),
    # A submit or a retry holds jobs again that are not leased and that a budget may not cover.
    Event.LEASE_RELEASED: ("waiting", "ready"),
    Event.LEASE_EXPIRED: ("waiting", "ready"),
    Event.JOB_SUCCEEDED: ("succeeded",),
    Event.JOB_ADOPTED: ("succeeded",),
    Event.JOB_FAILED: ("failed", "blocked"),
    Event.JOB_DEFERRED: ("waiting", "ready"),
    Event.JOBS_SKIPPED: ("skipped",),
    Event.JOBS_CANCELLED: ("cancelled",),
    Event.JOBS_BLOCKED: ("blocked",),
    Event.JOBS_RETRIED: ("waiting", "ready", "succeeded"),
    Event.JOBS_CHANGED: ("waiting", "ready", "succeeded"),
    Event.JOBS_REOPENED: ("waiting", "ready", "succeeded"),
}
"""Statuses that a job may have after the last event that names it."""


_AFRESH = frozenset({Event.JOBS_RETRIED, Event.JOBS_CHANGED, Event.JOBS_REOPENED})


_LISTING = _AFRESH | {Event.JOBS_SKIPPED, Event.JOBS_CANCELLED, Event.JOBS_BLOCKED}


GAP = ("first_seal", "last_seal", "events", "missing", "actor", "at_us")
"""Fields shown of an event that names the events a restored database lacks."""


@dataclass(slots=True)
class EventReplay:
    """State of each job according to the events, collected while the chains are read."""

    succeeded: dict[tuple[int, str], Json] = field(default_factory=dict)
    last: dict[int, tuple[int, str]] = field(default_factory=dict)
    attempts: dict[int, tuple[int, int]] = field(default_factory=dict)
    roots: dict[int, str] = field(default_factory=dict)
    gaps: list[Json] = field(default_factory=list)
    lost: list[range] = field(default_factory=list)
    """The numbers of the seals over events that a gap names as missing."""
    deleted: set[tuple[int, str]] = field(default_factory=set)
    erased: dict[int, tuple[int, str]] = field(default_factory=dict)
    changed: dict[int, int] = field(default_factory=dict)
    archived: dict[tuple[int, str], tuple[str, str]] = field(default_factory=dict)
    campaigns: CampaignReplay = field(default_factory=CampaignReplay)

    def apply(self, event: Json) -> None:
        """Apply one event; raises KeyError, TypeError or ValueError for one that this program did not write."""
        kind, at, subject = event["event"], event["at_us"], event["subject"]
        self.campaigns.apply(event)
        if kind == Event.CAMPAIGN_SUBMITTED:
            self.roots[event["version_id"]] = event["jobs_root"]
        elif kind in (Event.LEASE_TAKEN, Event.LEASE_RELEASED, Event.LEASE_EXPIRED):
            for job_id, attempt in event["jobs"]:
                self._note(job_id, at, kind, attempt)
        elif kind in (Event.JOB_SUCCEEDED, Event.JOB_ADOPTED, Event.JOB_FAILED, Event.JOB_DEFERRED):
            job_id = audit_subjects.job_id(subject)
            self._note(job_id, at, kind, event["attempt"])
            if kind in (Event.JOB_SUCCEEDED, Event.JOB_ADOPTED):
                self._succeeded(job_id, event)
        elif kind in _LISTING:
            for job_id in event["jobs"]:
                self._note(job_id, at, kind, 0 if kind in _AFRESH else None)
                if kind == Event.JOBS_CHANGED:
                    self.changed[job_id] = max(self.changed.get(job_id, at), at)
        elif kind == Event.AUDIT_GAP:
            self.gaps.append({name: event[name] for name in GAP})
            self.lost.append(range(event["first_seal"], event["last_seal"] + 1))
        else:
            self._apply_deletion(kind, event)

    def _apply_deletion(self, kind: str, event: Json) -> None:
        if kind == Event.EDITION_ARCHIVED:
            archived = audit_subjects.campaign_id(event["subject"]), event["edition"]
            self.archived[archived] = (event["key"], event["sha256"])
        elif kind == Event.PICTURES_DELETED:
            self.deleted.update((job_id, fp) for job_id, fp, _ in event["pictures"])
        elif kind == Event.JOBS_ERASED:
            for job_id, committed in event["jobs"]:
                erasure = event["at_us"], committed
                self.erased[job_id] = max(self.erased.get(job_id, erasure), erasure)

    def _succeeded(self, job_id: int, event: Json) -> None:
        """Record a success; the newest one counts, because a lost picture is made again."""
        known = self.succeeded.get((job_id, event["fingerprint"]), event)
        if known["at_us"] <= event["at_us"]:
            self.succeeded[job_id, event["fingerprint"]] = event

    def is_erased(self, job_id: int) -> bool:
        """Return True if the job's request was erased and has not been replaced since."""
        return job_id in self.erased and self.changed.get(job_id, -1) <= self.erased[job_id][0]

    def _note(self, job_id: int, at: int, kind: str, attempt: int | None) -> None:
        """Record an event of a job by time, because chains are read one by one; within a chain, by order."""
        if self.last.get(job_id, (at, ""))[0] <= at:
            self.last[job_id] = (at, kind)
        if attempt is not None and self.attempts.get(job_id, (at, 0))[0] <= at:
            self.attempts[job_id] = (at, attempt)
