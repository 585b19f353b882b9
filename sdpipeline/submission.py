"""From a campaign file to jobs in the database: checked as a whole, inputs copied, then published at once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sdpipeline import expand
from sdpipeline.batching import split
from sdpipeline.campaign import Campaign
from sdpipeline.db import registry, reports, staging
from sdpipeline.db import submit as publishing
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database
from sdpipeline.db.submit import Difference, Publication, Submitted
from sdpipeline.domain import JobSpec, Json
from sdpipeline.errors import CampaignError, InputImageError, Mistake
from sdpipeline.inputs import InputFile, InputFolder
from sdpipeline.spec import CampaignSpec
from sdpipeline.storage import ObjectStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a campaign file asks for, and what of that is new here."""

    name: str
    stages: dict[str, int]
    batches: int
    difference: Difference

    def document(self) -> Json:
        """The form of ``plan --json``; estimates need a history that later releases keep."""
        d = self.difference
        jobs = {"total": sum(self.stages.values()), "new": d.new, "unchanged": d.unchanged, "removed": d.removed}
        jobs |= {"reused": d.reused}
        estimate = {"gpu_seconds": None, "cost": None}
        return {
            "campaign": self.name,
            "jobs": jobs,
            "stages": self.stages,
            "batches": self.batches,
            "estimate": estimate,
        }


def plan(campaign: Campaign, inputs: InputFolder, database: Database | None, *, team: str, max_batch: int) -> Plan:
    """Expand once without writing; without a database every job is new."""
    tally = _Tally(stages=Counter({stage.id: 0 for stage in campaign.stage_order()}))
    jobs = tally.counted(expand.expand(campaign, inputs))
    if database is None:
        difference = Difference(new=sum(1 for _ in jobs), unchanged=0, removed=0)
    else:
        with database.read() as connection:
            name, reuse = campaign.spec.name, campaign.spec.reuse
            difference = publishing.compare(connection, jobs, team=team, name=name, reuse=reuse)
    batches = sum(len(split(count, 1 if exact else max_batch)) for (_, _, exact), count in tally.groups.items())
    return Plan(name=campaign.spec.name, stages=dict(tally.stages), batches=batches, difference=difference)


@dataclass(slots=True)
class _Tally:
    """What went by, by stage and by batch key of a stage; exact pictures are made one by one."""

    stages: Counter[str]
    groups: Counter[tuple[str, str, bool]] = field(default_factory=Counter)

    def counted(self, jobs: Iterable[JobSpec]) -> Iterator[JobSpec]:
        for spec in jobs:
            self.stages[spec.stage] += 1
            self.groups[spec.stage, spec.batch_key, spec.request.exact] += 1
            yield spec


def submit(
    campaign: Campaign,
    inputs: InputFolder,
    audit: AuditLog,
    store: ObjectStore,
    *,
    team: str,
    max_attempts: int,
    prune: bool = False,
) -> Submitted:
    """Check everything, copy the inputs, then publish in one transaction: workers see all of it or nothing."""
    if waiting := _overlap(campaign, audit.database, team):
        return waiting
    budget = campaign.spec.budget.model_dump(exclude_none=True) or None
    jobs = expand.expand(campaign, inputs)
    with staging.prepared(jobs, rules=delivery_rules(campaign.spec), held=budget is not None) as ready:
        if not ready.count:
            raise CampaignError(Mistake(file=campaign.source.file, message="asks for no picture", fix="give it rows"))
        copy_inputs(inputs.found.values(), store)
        used = {alias for stage in campaign.spec.stages for alias in stage.aliases()}
        used |= {campaign.spec.checkpoint for stage in campaign.spec.stages if not stage.checkpoint}
        with audit.transaction() as tx:
            registry.remember(tx, [campaign.catalog[alias] for alias in sorted(used)])
            asked = Publication(
                team=team,
                name=campaign.spec.name,
                source=campaign.text,
                priority=campaign.spec.priority,
                max_attempts=max_attempts,
                budget=budget,
            )
            return publishing.submit(tx, ready, asked, prune=prune)


def delivery_rules(spec: CampaignSpec) -> dict[str, Json]:
    """What the delivery of each stage's pictures obeys; none of it changes a pixel."""
    rules = {}
    for stage in spec.stages:
        quality = (stage.quality or spec.quality).model_dump(exclude_none=True)
        rules[stage.id] = {"reuse": spec.reuse, "quality": quality}
    return rules


def _overlap(campaign: Campaign, database: Database, team: str) -> Submitted | None:
    """A new edition is left out while an older one is being made, if the schedule says so."""
    planned = campaign.spec.schedule
    if planned is None or planned.mode != "edition" or planned.on_overlap != "skip":
        return None
    with database.read() as connection:
        campaign_id = reports.campaign_id(connection, team=team, name=campaign.spec.name)
        if campaign_id is None:
            return None
        older = reports.unfinished_editions(connection, campaign_id) - {campaign.edition}
        if not older or reports.has_edition(connection, campaign_id, campaign.edition):
            return None
        version = reports.progress(connection, campaign_id).version
    why = f"edition {campaign.edition} is left out: {', '.join(sorted(older))} is still being made"
    return Submitted(campaign_id=campaign_id, version=version, added=0, unchanged=0, cancelled=0, left_out=why)


def copy_inputs(found: Iterable[InputFile], store: ObjectStore) -> None:
    """Put local pictures into storage under their digest, so that workers elsewhere find them."""
    for each in found:
        data = Path(each.path).read_bytes()
        if hashlib.sha256(data).hexdigest() != each.sha256:
            raise InputImageError(f"{each.path.name} changed while it was read; submit again")
        store.put(each.key, data, content_type="application/octet-stream")
