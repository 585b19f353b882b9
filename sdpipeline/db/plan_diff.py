"""Dry run of a submit: compare each job with the database, without writing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, func, select

from sdpipeline.db import reuse as reuse_queries
from sdpipeline.db.staging import POLICY, chunked
from sdpipeline.db.tables import campaign, job
from sdpipeline.domain import JobSpec, Json, changed_keys, to_document

CHUNK = 1000
NEW_IDENTITY = "identity"
"""The key in a difference for a row, combination or seed that was not submitted before."""


@dataclass(slots=True, kw_only=True)
class Change:
    """Jobs of a stage that are new because of one key, with the first of them as an example."""

    stage: str
    key: str
    was: Any
    now: Any
    jobs: int = 0

    def document(self) -> Json:
        """Return the document of ``plan --diff --json``."""
        return {"stage": self.stage, "key": self.key, "jobs": self.jobs, "was": self.was, "now": self.now}


@dataclass(slots=True, kw_only=True)
class Difference:
    """Effect of a submit, by stage.

    ``reused`` counts new jobs whose picture the team has already, ``blocked`` jobs that a policy forbids. ``to_make``
    counts jobs without a picture, by stage and batch key.
    """

    new: Counter[str] = field(default_factory=Counter)
    reused: Counter[str] = field(default_factory=Counter)
    blocked: Counter[str] = field(default_factory=Counter)
    unchanged: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    to_make: Counter[tuple[str, str]] = field(default_factory=Counter)
    changes: dict[tuple[str, str], Change] = field(default_factory=dict)

    def note_new(self, spec: JobSpec, stored: Json | None) -> None:
        """Count a new job under every key that makes it new; ``stored`` is the previous request."""
        if stored is None:
            example = {"row": spec.row_key, "variables": dict(spec.axes), "seed": spec.seed}
            self._note(spec.stage, NEW_IDENTITY, None, example)
            return
        for key, (was, now) in changed_keys(stored, to_document(spec.request)).items():
            self._note(spec.stage, key, was, now)

    def _note(self, stage: str, key: str, was: Any, now: Any) -> None:
        change = self.changes.setdefault((stage, key), Change(stage=stage, key=key, was=was, now=now))
        change.jobs += 1


def compare(
    connection: Connection | None,
    jobs: Iterable[JobSpec],
    *,
    team: str,
    name: str,
    reuse: bool = True,
    explain: bool = False,
) -> Difference:
    """Compute the effect of :func:`sdpipeline.db.submit.submit`; identities are looked up in chunks.

    ``reuse`` looks for pictures that need not be made again, ``explain`` for the keys that make jobs new. Without a
    database every job is new.
    """
    found = Difference()
    if connection is None:
        for spec in jobs:
            _add(found, spec, None, reusable=frozenset(), explain=explain)
        return found
    owner = select(campaign.c.id).where(campaign.c.team == team, campaign.c.name == name)
    campaign_id = connection.execute(owner).scalar()
    editions: set[str] = set()
    for chunk in chunked(jobs, CHUNK):
        stored = _stored(connection, campaign_id, [spec.identity for spec in chunk], explain=explain)
        editions |= {spec.edition for spec in chunk}
        fresh = {spec.fingerprint for spec in chunk if reuse and spec.blocked is None}
        reusable = reuse_queries.known(connection, team=team, fingerprints=fresh)
        for spec in chunk:
            row = stored.get(spec.identity)
            _add(found, spec, row, reusable=reusable, explain=explain)
            found.removed[spec.stage] -= row is not None
    asked = (job.c.campaign_id == campaign_id, job.c.edition.in_(editions), job.c.status != "cancelled")
    for stage, count in connection.execute(select(job.c.stage, func.count()).where(*asked).group_by(job.c.stage)):
        found.removed[stage] += count
    return found


def _stored(connection: Connection, campaign_id: int | None, identities: list[str], *, explain: bool) -> dict[str, Any]:
    columns = [job.c.identity, job.c.fingerprint, job.c.status, job.c.error_kind, *([job.c.request] if explain else [])]
    mine = (job.c.campaign_id == campaign_id, job.c.identity.in_(identities), job.c.status != "cancelled")
    return {row.identity: row for row in connection.execute(select(*columns).where(*mine))}


def _add(found: Difference, spec: JobSpec, row: Any | None, *, reusable: Collection[str], explain: bool) -> None:
    allowed = row is not None and (row.status, row.error_kind) == ("blocked", POLICY) and spec.blocked is None
    same = row is not None and row.fingerprint == spec.fingerprint and not allowed
    (found.unchanged if same else found.new)[spec.stage] += 1
    if spec.blocked is not None:
        found.blocked[spec.stage] += 1
    elif not same and spec.fingerprint in reusable:
        found.reused[spec.stage] += 1
    elif not same or (row is not None and row.status != "succeeded"):
        found.to_make[spec.stage, spec.batch_key] += 1
    if explain and not same:
        found.note_new(spec, row.request if row is not None else None)
