"""Control of a campaign's jobs: reopen, cancel, pause and resume."""

from __future__ import annotations

from sdpipeline.app.services import Services
from sdpipeline.db import job_control


def reopen(services: Services, campaign: str, status: str) -> tuple[int, int]:
    """Reopen the jobs of a status; return how many were reopened, and how many were not because a policy forbids
    them."""
    campaign_id = services.campaign_id(campaign)
    with services.audit.transaction() as tx:
        count = job_control.retry(tx, campaign_id=campaign_id, statuses=[status])
        return count, job_control.forbidden(tx.connection, campaign_id=campaign_id, status=status)


def cancel(services: Services, campaign: str) -> int:
    """Cancel the unfinished jobs of a campaign; return their number."""
    campaign_id = services.campaign_id(campaign)
    with services.audit.transaction() as tx:
        return job_control.cancel(tx, campaign_id=campaign_id)


def set_status(services: Services, campaign: str, status: str) -> None:
    """Set a campaign to ``active`` or ``paused``."""
    campaign_id = services.campaign_id(campaign)
    with services.audit.transaction() as tx:
        job_control.set_campaign_status(tx, campaign_id=campaign_id, status=status)
