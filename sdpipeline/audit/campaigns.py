"""Verification of campaigns, their versions and costs, and checkpoints against the events."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from sdpipeline.audit.findings import Verification
from sdpipeline.db import audit_queries, audit_subjects
from sdpipeline.db.audit import Event
from sdpipeline.db.connection import Connection
from sdpipeline.domain import Json

AMOUNTS = ("images", "size_bytes", "gpu_seconds", "cost")
_TERMS = ("team", "name", "budget", "priority")
_STATUSES = (Event.CAMPAIGN_PAUSED, Event.CAMPAIGN_RESUMED)
_ATTEMPTS = (Event.JOB_SUCCEEDED, Event.JOB_FAILED, Event.JOB_DEFERRED, Event.JOB_ADOPTED)
_Key = TypeVar("_Key")
_TOLERANCE = 1e-6
"""Tolerance for sums of the same numbers in another order."""


@dataclass(slots=True)
class CampaignReplay:
    """State of campaigns, versions, costs and checkpoints according to the events, collected while chains are read.

    Chains are read one after the other, so the newest event is the one with the latest time.
    """

    statuses: dict[int, Json] = field(default_factory=dict)
    versions: dict[int, Json] = field(default_factory=dict)
    newest: dict[int, Json] = field(default_factory=dict)
    dropped: set[tuple[int, int]] = field(default_factory=set)
    """(campaign, version number) of campaign files that were deleted."""
    spent: dict[tuple[int, int, str], list[float]] = field(default_factory=dict)
    attempts: dict[tuple[int, str], tuple[float, float]] = field(default_factory=dict)
    """GPU-seconds and cost of attempts, by job and lease."""
    unpriced: set[str] = field(default_factory=set)
    """Workers of releases whose events did not record the cost of an attempt."""
    approved: dict[tuple[str, str], Json] = field(default_factory=dict)
    judged: dict[str, Json] = field(default_factory=dict)

    def apply(self, event: Json) -> None:
        """Apply one event; raises KeyError, TypeError or ValueError for a malformed one."""
        kind = event["event"]
        if kind in _ATTEMPTS:
            self._spend(event)
        elif kind in (Event.CHECKPOINT_ADDED, Event.CHECKPOINT_REVOKED):
            _keep_newest(self.judged, event["digest"], event)
            if kind == Event.CHECKPOINT_ADDED:
                _keep_newest(self.approved, (event["digest"], event["alias"]), event)
        elif kind in _STATUSES:
            _keep_newest(self.statuses, _campaign(event), event)
        elif kind == Event.CAMPAIGN_SUBMITTED:
            self.versions[event["version_id"]] = event
            _keep_newest(self.newest, _campaign(event), event)
        elif kind == Event.SOURCES_DELETED:
            self.dropped.update((_campaign(event), number) for number in event["versions"])

    def _spend(self, event: Json) -> None:
        if "spent" not in event:
            worker = event["worker"] if "worker" in event else audit_subjects.worker_id(str(event["actor"]))
            if worker is not None:
                self.unpriced.add(worker)
        elif (one := event["spent"]) is not None:
            sums = self.spent.setdefault((one["campaign"], one["group"], event["worker"]), [0.0] * len(AMOUNTS))
            for n, name in enumerate(AMOUNTS):
                sums[n] += one[name]
            if "lease" in event:
                job_id = audit_subjects.job_id(event["subject"])
                self.attempts[job_id, event["lease"]] = one["gpu_seconds"], one["cost"]


def _keep_newest(known: dict[_Key, Json], key: _Key, event: Json) -> None:
    if known.get(key, event)["at_us"] <= event["at_us"]:
        known[key] = event


def _campaign(event: Json) -> int:
    return audit_subjects.campaign_id(event["subject"])


def verify_campaigns(connection: Connection, found: Verification, replay: CampaignReplay) -> None:
    """Compare every row of campaigns, versions, spending and checkpoints with the events."""
    campaigns = {row["id"]: row for row in audit_queries.campaigns(connection)}
    for campaign_id, row in campaigns.items():
        for detail in _campaign_faults(row, replay):
            found.fault("campaign-altered", f"campaign:{campaign_id}", detail)
    for campaign_id in sorted((replay.newest.keys() | replay.statuses.keys()) - campaigns.keys()):
        found.fault("campaign-missing", f"campaign:{campaign_id}", "it is in the audit log, but not in the database")
    _verify_versions(connection, found, replay)
    _verify_spending(connection, found, replay)
    for row in audit_queries.checkpoints(connection):
        for detail in _checkpoint_faults(row, replay):
            found.fault("checkpoint-altered", f"checkpoint:{row['digest'][:16]}", f"{row['alias']}: {detail}")


def _campaign_faults(row: Json, replay: CampaignReplay) -> Iterator[str]:
    last = replay.statuses.get(row["id"], {})
    for_budget = last.get("reason") == "budget"
    expected = "paused" if last.get("event") == Event.CAMPAIGN_PAUSED else "active"
    # The previous release wrote no event when a submit ended a pause for the budget.
    unsure = for_budget and "budget" not in last and row["status"] == "active"
    if row["status"] != expected and not unsure:
        yield f"it is {row['status']}, the audit log says {expected}"
    if row["status"] == expected == "paused" and (row["paused_because"] is not None) != for_budget:
        yield "its reason for the pause differs from the audit log"
    newest = replay.newest.get(row["id"], {})
    # The previous release wrote no terms.
    for name in [name for name in _TERMS if name in newest]:
        if row[name] != newest[name]:
            yield f"its {name} is {row[name]!r}, the audit log says {newest[name]!r}"
    if newest.get("version_id") != row["version_id"]:
        yield "its current version is not the one submitted last"


def _verify_versions(connection: Connection, found: Verification, replay: CampaignReplay) -> None:
    missing = dict(replay.versions)
    for row in audit_queries.versions(connection):
        event = missing.pop(row["id"], None)
        for detail in _version_faults(row, event, replay):
            found.fault("campaign-altered", f"version:{row['id']}", detail)
    for version_id in missing:
        found.fault("campaign-missing", f"version:{version_id}", "it is in the audit log, but not in the database")


def _version_faults(row: Json, event: Json | None, replay: CampaignReplay) -> Iterator[str]:
    if event is None:
        yield "the audit log has no record of its submission"
        return
    recorded = {"number": event["version"], "actor": event["actor"]}
    recorded |= {name: event[name] for name in ("source_sha256", "jobs_root")} | {"campaign_id": _campaign(event)}
    for name, value in recorded.items():
        if row[name] != value:
            yield f"its {name} is {row[name]!r}, the audit log says {value!r}"
    dropped = (row["campaign_id"], row["number"]) in replay.dropped
    if dropped != (row["source"] == "" and event["source_sha256"] != hashlib.sha256(b"").hexdigest()):
        yield (
            "its file was deleted, but is still stored"
            if dropped
            else "its file is missing, and no deletion is recorded"
        )
    elif not dropped and hashlib.sha256(row["source"].encode()).hexdigest() != event["source_sha256"]:
        yield "its file differs from the submitted one"


def _verify_spending(connection: Connection, found: Verification, replay: CampaignReplay) -> None:
    spending = dict(replay.spent)
    for row in audit_queries.spent(connection):
        key = row["campaign_id"], row["group_id"], row["worker_id"]
        sums = spending.pop(key, [0.0] * len(AMOUNTS))
        for name, expected in zip(AMOUNTS, sums, strict=True):
            known = row["worker_id"] not in replay.unpriced
            if _differ(row[name], expected) and (known or row[name] < expected):
                detail = f"worker {row['worker_id']} spent {name} {row[name]:g}, the audit log says {expected:g}"
                found.fault("cost-altered", f"campaign:{row['campaign_id']}", detail)
    for attempt in audit_queries.ended_attempts(connection):
        cost = replay.attempts.get((attempt["job_id"], attempt["lease_id"]))
        stored = attempt["gpu_seconds"] or 0.0, attempt["cost"] or 0.0
        if cost is not None and any(map(_differ, stored, cost)):
            detail = f"attempt {attempt['number']} cost {stored[1]:g}, the audit log says {cost[1]:g}"
            found.fault("cost-altered", f"job:{attempt['job_id']}", detail)
    for (campaign_id, _, worker_id), sums in spending.items():
        if any(sums):
            detail = f"the spending of worker {worker_id} is in the audit log, but not in the database"
            found.fault("cost-altered", f"campaign:{campaign_id}", detail)


def _differ(stored: float, expected: float) -> bool:
    return not math.isclose(stored, expected, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


def _checkpoint_faults(row: Json, replay: CampaignReplay) -> Iterator[str]:
    event = replay.approved.get((row["digest"], row["alias"]))
    if event is None:
        yield "the audit log has no record of its approval"
        return
    for name in ("licence", "purposes", "expires_at"):
        if name in event and row[name] != event[name]:
            yield f"its {name} is {row[name]!r}, the audit log says {event[name]!r}"
    for name in ("native_size", "defaults", "ignored"):  # not in the event if empty; NULL in rows of older releases
        if (row[name] or None) != event.get(name):
            yield f"its {name} is {row[name]!r}, the audit log says {event.get(name)!r}"
    last = replay.judged[row["digest"]]
    revoked = row["revoked_at"] is not None
    # An approval under another alias may come from a campaign that uses it, which does not lift a revocation.
    if last["event"] == Event.CHECKPOINT_REVOKED and not revoked:
        yield "it is approved, the audit log says that it was revoked"
    if last == event and revoked:
        yield "it is revoked, the audit log says that it was approved"
