"""Prefect events of a campaign, so that automations can notify someone."""

from __future__ import annotations

from enum import StrEnum

from sdpipeline.db.queries import Progress

PREFIX = "sdpipeline.campaign"


class CampaignEvent(StrEnum):
    """Campaign events, by the names that an automation's trigger expects."""

    STARTED = f"{PREFIX}.started"
    FINISHED = f"{PREFIX}.finished"
    FAILED = f"{PREFIX}.failed"
    PAUSED = f"{PREFIX}.paused"
    BUDGET_SPENT = f"{PREFIX}.budget-spent"
    RESUMED = f"{PREFIX}.resumed"


def emit_campaign_event(event: CampaignEvent, team: str, progress: Progress) -> None:
    """Emit the event with the campaign as its resource; sending happens in the background and may fail without harm.

    Called inside a flow run, which becomes a related resource.
    """
    from prefect.events import emit_event

    emit_event(
        event=str(event),
        resource={
            "prefect.resource.id": f"{PREFIX}.{team}.{progress.name}",
            "prefect.resource.name": progress.name,
            "sdpipeline.team": team,
        },
        payload=progress.document(),
    )


def outcome(progress: Progress) -> CampaignEvent | None:
    """Return the outcome of a run that leaves nothing to do; None while work is left."""
    if progress.remaining:
        return None
    return CampaignEvent.FAILED if progress.failed or progress.blocked else CampaignEvent.FINISHED


def status_change(before: str | None, progress: Progress) -> CampaignEvent | None:
    """Return the event for a change of campaign status since ``before``, or None."""
    if progress.status == "paused" and before != "paused" and progress.remaining:
        return CampaignEvent.BUDGET_SPENT if progress.paused_because else CampaignEvent.PAUSED
    return CampaignEvent.RESUMED if before == "paused" and progress.status == "active" else None
