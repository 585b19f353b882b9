"""Planning and submission of a campaign: check it as a whole, copy its inputs, publish its jobs at once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from sdpipeline.batching import split
from sdpipeline.campaigns import expand, policy
from sdpipeline.campaigns.inputs import InputFile, InputFolder
from sdpipeline.campaigns.loader import Campaign
from sdpipeline.db import archives, queries, registry, staging
from sdpipeline.db import submit as db_submit
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Connection, Database
from sdpipeline.db.cost_history import usual
from sdpipeline.db.plan_diff import Difference, compare
from sdpipeline.db.submit import Publication, Submitted
from sdpipeline.domain import JobSpec, Json
from sdpipeline.errors import CampaignError, InputImageError, Mistake
from sdpipeline.jobs import DeliveryRules, QualityThresholds
from sdpipeline.storage import ObjectStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Estimated resources for all jobs without a picture; None if some have no comparable history here.

    ``unknown`` counts the jobs without such a history. ``cost`` needs a price as well.
    """

    gpu_seconds: float | None
    size_bytes: float | None
    cost: float | None
    unknown: int

    def document(self) -> Json:
        """Return the JSON form of ``plan --json``."""
        size_bytes = None if self.size_bytes is None else round(self.size_bytes)
        seconds = None if self.gpu_seconds is None else round(self.gpu_seconds, 3)
        cost = None if self.cost is None else round(self.cost, 4)
        return {"gpu_seconds": seconds, "cost": cost, "bytes": size_bytes, "jobs_without_history": self.unknown}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Jobs and batches of a campaign file, compared with the database."""

    name: str
    edition: str
    stages: dict[str, int]
    batches: int
    difference: Difference
    estimate: Estimate
    warnings: Sequence[Mistake] = ()

    def document(self) -> Json:
        """Return the JSON form of ``plan --json``."""
        d = self.difference
        counts = {
            "new": d.new,
            "reused": d.reused,
            "blocked": d.blocked,
            "unchanged": d.unchanged,
            "removed": d.removed,
        }
        jobs = {"total": sum(self.stages.values())} | {name: sum(each.values()) for name, each in counts.items()}
        known = [*self.stages, *sorted(stage for stage, gone in d.removed.items() if gone and stage not in self.stages)]
        return {
            "campaign": self.name,
            "edition": self.edition,
            "jobs": jobs,
            "stages": self.stages,
            "by_stage": {stage: {name: each[stage] for name, each in counts.items()} for stage in known},
            "batches": self.batches,
            "estimate": self.estimate.document(),
            "diff": [change.document() for change in d.changes.values()],
            "warnings": [warning.document() for warning in self.warnings],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """Planning inputs of a deployment: the team, pictures in a batch, and the price of a device second."""

    team: str
    max_batch: int
    gpu_second_cost: float | None = None


def plan(
    campaign: Campaign, inputs: InputFolder, database: Database | None, planning: Planning, *, explain: bool = False
) -> Plan:
    """Expand once without writing; without a database every job is new. ``explain`` finds why jobs are new."""
    tally = _Tally(stages=Counter({stage.id: 0 for stage in campaign.stage_order()}))
    jobs = tally.counted(expand.expand(campaign, inputs))
    with database.read() if database is not None else nullcontext() as connection:
        about = {"team": planning.team, "name": campaign.spec.name}
        difference = compare(connection, jobs, **about, reuse=campaign.spec.reuse, explain=explain)
        estimate = _estimate(connection, difference, planning.gpu_second_cost)
    groups = tally.groups.items()
    batches = sum(len(split(count, 1 if exact else planning.max_batch)) for (_, _, exact), count in groups)
    return Plan(
        name=campaign.spec.name,
        edition=campaign.edition,
        stages=dict(tally.stages),
        batches=batches,
        difference=difference,
        estimate=estimate,
        warnings=campaign.warnings.in_order(),
    )


def _estimate(connection: Connection | None, difference: Difference, gpu_second_cost: float | None) -> Estimate:
    gpu_seconds = size_bytes = 0.0
    unknown = 0
    for (_, batch_key), count in difference.to_make.items():
        each = usual(connection, batch_key) if connection is not None else None
        if each is None:
            unknown += count
        else:
            gpu_seconds += count * each.gpu_seconds
            size_bytes += count * each.size_bytes
    if unknown:
        return Estimate(gpu_seconds=None, size_bytes=None, cost=None, unknown=unknown)
    cost = None if gpu_second_cost is None else gpu_seconds * gpu_second_cost
    return Estimate(gpu_seconds=gpu_seconds, size_bytes=size_bytes, cost=cost, unknown=0)


@dataclass(slots=True)
class _Tally:
    """Job counts by stage and by batch key of a stage; exact pictures are generated one by one."""

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
    strict: bool = False,
) -> Submitted:
    """Check everything, copy the inputs, then publish in one transaction: workers see all jobs or none.

    With ``strict``, a warning about the file is an error, and nothing is published.
    """
    _refuse_archived(campaign, audit.database, team)
    if waiting := _overlap(campaign, audit.database, team):
        return waiting
    budget = campaign.spec.budget.model_dump(exclude_none=True) or None
    jobs = expand.expand(campaign, inputs)
    with staging.prepared(jobs, rules=delivery_rules(campaign), held=budget is not None) as ready:
        if not ready.count:
            raise CampaignError(Mistake(file=campaign.source.file, message="asks for no picture", fix="give it rows"))
        campaign.warnings.raise_if_strict(strict=strict)
        copy_inputs(inputs.found.values(), store)
        used = {alias for stage in campaign.spec.stages for alias in stage.aliases()}
        used |= {campaign.spec.checkpoint for stage in campaign.spec.stages if not stage.checkpoint}
        used |= {check.checker.alias for check in policy.safety_checks(campaign.policies, campaign.catalog)}
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
            done = db_submit.submit(tx, ready, asked, prune=prune)
        return replace(done, warnings=campaign.warnings.in_order())


def delivery_rules(campaign: Campaign) -> dict[str, DeliveryRules]:
    """Return the delivery rules of each stage's pictures; none of them changes a pixel."""
    spec, safety = campaign.spec, policy.safety_checks(campaign.policies, campaign.catalog)
    return {
        stage.id: DeliveryRules(
            reuse=spec.reuse,
            quality=QualityThresholds(**(stage.quality or spec.quality).model_dump()),
            safety=safety,
            include_prompt=spec.provenance.include_prompt,
        )
        for stage in spec.stages
    }


def _refuse_archived(campaign: Campaign, database: Database, team: str) -> None:
    """Refuse an archived edition, whose jobs would be run a second time."""
    with database.read() as connection:
        closed = archives.is_archived(connection, team=team, name=campaign.spec.name, edition=campaign.edition)
    if closed:
        what = f"edition {campaign.edition!r}" if campaign.edition else "the campaign without an edition"
        message = f"{what} is archived and cannot be made again"
        raise CampaignError(Mistake(file=campaign.source.file, message=message, fix="--edition with another name"))


def _overlap(campaign: Campaign, database: Database, team: str) -> Submitted | None:
    """Skip a new edition while an older one is unfinished, if the schedule says so."""
    planned = campaign.spec.schedule
    if planned is None or planned.mode != "edition" or planned.on_overlap != "skip":
        return None
    with database.read() as connection:
        campaign_id = queries.campaign_id(connection, team=team, name=campaign.spec.name)
        if campaign_id is None:
            return None
        older = queries.unfinished_editions(connection, campaign_id) - {campaign.edition}
        if not older or queries.has_edition(connection, campaign_id, campaign.edition):
            return None
        present = queries.progress(connection, campaign_id)
    if present.paused_because:
        return None  # the campaign is paused, and a larger budget in the file has to take effect
    why = f"edition {campaign.edition} is skipped: {', '.join(sorted(older))} is still being made"
    return Submitted(campaign_id=campaign_id, version=present.version, added=0, unchanged=0, cancelled=0, left_out=why)


def copy_inputs(found: Iterable[InputFile], store: ObjectStore) -> None:
    """Upload local pictures to storage under their digest, so that workers on other hosts find them."""
    for each in found:
        data = Path(each.path).read_bytes()
        if hashlib.sha256(data).hexdigest() != each.sha256:
            raise InputImageError(f"{each.path.name} changed while it was read; submit again")
        store.put(each.key, data, content_type="application/octet-stream")
