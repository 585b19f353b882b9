"""Supervision of a campaign's run reads its state from the database."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import update

from sdpipeline.app.services import Services
from sdpipeline.db import job_control, tables
from sdpipeline.db.audit import AuditLog
from sdpipeline.orchestration.campaign_run import current_progress
from sdpipeline.settings import Settings
from tests.factories import chains, leased, published
from tests.integration.databases import on_sqlite

pytestmark = on_sqlite


def test_an_expired_lease_does_not_keep_a_paused_campaigns_run_open(audit: AuditLog, tmp_path: Path) -> None:
    published(audit, chains(2), name="spring")
    services = Services(Settings(home=tmp_path), audit.database, audit)
    lease = leased(audit, limit=1)
    with audit.transaction() as tx:
        job_control.set_campaign_status(tx, campaign_id=services.campaign_id("spring"), status="paused")
    assert current_progress(services, "spring").leased == 1
    assert current_progress(services, "spring").leased == 1  # the worker is alive
    with audit.database.write() as connection:
        connection.execute(update(tables.lease).where(tables.lease.c.id == lease.id).values(expires_at=0.0))
    current_progress(services, "spring")
    assert current_progress(services, "spring").leased == 0
