"""Choice and validation of a stage's reproducibility and speed profile."""

from __future__ import annotations

from sdpipeline.campaigns.spec import CampaignSpec
from sdpipeline.campaigns.stage_spec import Stage
from sdpipeline.campaigns.yaml_source import Faults, KeyPath
from sdpipeline.domain import Profile, Reproducibility
from sdpipeline.engine import families
from sdpipeline.engine.families import Family
from sdpipeline.engine.stepwise.profiles import PROFILES


def chosen(spec: CampaignSpec, stage: Stage, row: Family) -> tuple[Reproducibility, Profile]:
    """Return a stage's reproducibility and profile: its own, else the campaign's.

    The campaign's profile is limited to those that the stage's checkpoint and reproducibility allow.
    """
    exactness = stage.reproducibility or spec.reproducibility
    wanted: Profile = stage.profile or spec.profile or "exact"
    if exactness == "strict":
        return "strict", "exact"
    order = list(PROFILES)
    possible = [profile for profile in row.profiles if order.index(profile) <= order.index(wanted)]
    return "tolerant", possible[-1]


def check(spec: CampaignSpec, faults: Faults) -> None:
    """Refuse strict reproducibility with a profile that changes bits."""
    if spec.reproducibility == "strict":
        _check_strict(spec.profile, ("profile",), faults)
    for n, stage in enumerate(spec.stages):
        if (stage.reproducibility or spec.reproducibility) == "strict":
            _check_strict(stage.profile, ("stages", n, "profile"), faults)


def check_fit(stage: Stage, path: KeyPath, faults: Faults, row: Family) -> None:
    """Refuse a stage's own profile that its checkpoint does not support; the campaign's is lowered to fit."""
    if stage.profile is not None and (why := families.profile_refusal(row.name, stage.profile)):
        message, _, fix = why.partition("; ")
        faults.add((*path, "profile"), message, fix)


def _check_strict(profile: Profile | None, path: KeyPath, faults: Faults) -> None:
    if profile not in (None, "exact"):
        faults.add(path, f"{profile!r} is not strict", "write exact, or reproducibility: tolerant")
