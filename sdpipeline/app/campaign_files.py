"""Campaign files: allowed inputs, loading, and checks against checkpoints, policy and prices of this installation."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from sdpipeline.app.checkpoints import HASH_CACHE, inspect_all
from sdpipeline.app.stores import s3_options
from sdpipeline.campaigns import policy
from sdpipeline.campaigns.inputs import InputFolder
from sdpipeline.campaigns.loader import Campaign
from sdpipeline.campaigns.loader import load as load_campaign_file
from sdpipeline.db.connection import Database
from sdpipeline.engine.checkpoints import verify as verify_checkpoint
from sdpipeline.engine.hash_cache import HashCache
from sdpipeline.errors import BadInputError, CampaignError, CheckpointError, Mistake
from sdpipeline.settings import Settings
from sdpipeline.storage import ForeignObjects, is_bucket_url

EDITION_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def check_edition(edition: str | None) -> None:
    """Raise BadInputError if this cannot be the name of an edition."""
    if edition is not None and not EDITION_NAME.fullmatch(edition):
        fix = "write at most 63 of a-z, 0-9 and -, as in 2026-11-25"
        raise BadInputError(Mistake(message=f"--edition {edition!r} is not a valid name", fix=fix))


def input_folder(settings: Settings, folder: Path) -> InputFolder:
    """Return the allowed sources of a campaign's pictures and tables: its folder and what the settings allow in
    addition."""
    # A plan must report within 15 seconds that a bucket does not answer.
    patience = replace(s3_options(settings), connect_timeout_s=2, read_timeout_s=5, total_max_attempts=2)
    return InputFolder(
        folder,
        allowed=[Path(root) for root in settings.inputs.allowed if not is_bucket_url(root)],
        buckets=[root for root in settings.inputs.allowed if is_bucket_url(root)],
        foreign=ForeignObjects(patience),
        max_pixels=settings.inputs.max_pixels,
    )


def load_campaign(
    settings: Settings,
    path: Path,
    database: Database | None = None,
    *,
    edition: str | None = None,
    now: datetime | None = None,
) -> tuple[Campaign, InputFolder]:
    """Load and check a campaign file; return it with the folder of its inputs.

    Raises CampaignError, or SettingsError if the deployment's policy is wrong. ``now`` is the time its schedule fired.
    """
    inputs = input_folder(settings, path.absolute().parent)
    rules = policy.load(settings.policy_file) if settings.policy_file else None
    cache = HashCache(settings.home / HASH_CACHE)
    known, refused = inspect_all(settings, database, cache)
    try:
        campaign = load_campaign_file(path, known, inputs, edition=edition, now=now, deployment=rules)
    except CampaignError as error:
        raise CampaignError(*(_with_reason(mistake, refused) for mistake in error.mistakes)) from error
    _check_weights(campaign, cache)
    if campaign.spec.budget.max_cost is not None and settings.cost_per_gpu_hour is None:
        place = ("budget", "max_cost")
        raise CampaignError(campaign.source.mistake(place, "needs a price per GPU-hour", "set SDP_COST_PER_GPU_HOUR"))
    return campaign, inputs


def _with_reason(mistake: Mistake, refused: Mapping[str, CheckpointError]) -> Mistake:
    """Add the reason to a mistake about an unknown checkpoint, if its directory was refused."""
    for alias, why in refused.items():
        if mistake.message.startswith("no ") and repr(alias) in mistake.message:
            return replace(mistake, message=str(why), fix=None)
    return mistake


def _check_weights(campaign: Campaign, cache: HashCache) -> None:
    """Raise CampaignError if weights on this machine differ from the approved ones."""
    spec, source = campaign.spec, campaign.source
    used: dict[str, tuple[str | int, ...]] = {spec.checkpoint: ("checkpoint",)}
    for n, stage in enumerate(spec.stages):
        used |= {alias: ("stages", n) for alias in stage.aliases() if alias not in used}
    for rules in campaign.policies:
        if (checker := rules.policy.safety_checker) and checker not in used:
            used[checker] = ("policy", "safety_checker")
    mistakes = []
    for alias, place in used.items():
        files = campaign.catalog.get(alias)
        if files is None or not os.path.lexists(files.directory):
            continue
        try:
            verify_checkpoint(files, cache=cache)
        except CheckpointError as error:
            mistakes.append(source.mistake(place, str(error)))
    cache.save()
    if mistakes:
        raise CampaignError(*mistakes)
