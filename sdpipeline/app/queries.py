"""Queries of one campaign on an open database: progress, failures, newest pictures, closing report."""

from __future__ import annotations

from sdpipeline.app.services import Services
from sdpipeline.db import queries, registry
from sdpipeline.db.queries import Progress
from sdpipeline.domain import Json
from sdpipeline.reporting import contact_sheet, report
from sdpipeline.reporting.contact_sheet import Thumbnails
from sdpipeline.reporting.report import Span


def campaign_progress(services: Services, campaign: str) -> Progress:
    """Return the progress of a submitted campaign."""
    campaign_id = services.campaign_id(campaign)
    with services.database.read() as connection:
        return queries.progress(connection, campaign_id)


def failures(services: Services, campaign: str, *, limit: int = 100) -> list[Json]:
    """Return the first failed, then blocked jobs with their reasons."""
    campaign_id = services.campaign_id(campaign)
    with services.database.read() as connection:
        return queries.failures(connection, campaign_id, limit)


def newest_pictures(
    services: Services, campaign: str, *, max_bytes: int = 200_000, kept: Thumbnails | None = None
) -> bytes | None:
    """Return the newest pictures as one small JPEG; ``kept`` caches thumbnails so that a redraw need not read them
    again."""
    campaign_id = services.campaign_id(campaign)
    return contact_sheet.draw(services.database, services.store, campaign_id, max_bytes=max_bytes, kept=kept)


def finish_report(services: Services, campaign: str, span: Span | None = None) -> str:
    """Return the closing report as markdown; ``span`` is the run that closes."""
    return report.closing_report(services.database, services.store, services.campaign_id(campaign), span=span)


def unfinished_campaigns(services: Services) -> list[str]:
    """Return the names of the team's campaigns with work left."""
    team = services.settings.team
    with services.database.read() as connection:
        names = queries.campaign_names(connection, team=team)
        ids = {name: queries.campaign_id(connection, team=team, name=name) for name in names}
        return [name for name, of in ids.items() if of is not None and queries.work_left(connection, of)]


def checkpoint_aliases(services: Services, campaign_id: int) -> list[str]:
    """Return the aliases of the checkpoints that a campaign uses."""
    with services.database.read() as connection:
        used = set(queries.checkpoints_of(connection, campaign_id))
        return sorted({files.alias for files in registry.known(connection) if {files.alias, files.digest} & used})
