"""Prefect artifacts and events of a campaign's run; best effort, so that their failure harms no work."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import structlog

from sdpipeline.app.queries import failures, finish_report, newest_pictures
from sdpipeline.app.services import Services
from sdpipeline.db.queries import Progress
from sdpipeline.errors import TransientError
from sdpipeline.escaping import markdown
from sdpipeline.orchestration import events
from sdpipeline.orchestration.events import CampaignEvent
from sdpipeline.reporting import report
from sdpipeline.reporting.contact_sheet import Thumbnails
from sdpipeline.reporting.report import Span

SHOW_EVERY_S = 5.0
REFRESH_EVERY_S = 15.0
REFRESHING_SHARE = 0.05  # of the time at most: with a million pictures, finding the newest takes a while

log = structlog.get_logger(__name__)


@contextmanager
def best_effort() -> Iterator[None]:
    """Best effort: errors of the Prefect API, storage and database are logged and ignored."""
    import httpx
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):  # five would delay the supervisor by a minute
            yield
    except httpx.HTTPError as error:
        log.warning("prefect_unavailable", error=repr(error))
    except TransientError as error:  # storage or database: the workers wait for them and report it
        log.warning("artifacts_not_updated", error=str(error))


class RunArtifacts:
    """Artifacts and events of one campaign run: progress, newest pictures and failures while it runs, then a report.

    Artifacts are created once a run and then updated in place, so that a long run does not fill the server's database.
    """

    def __init__(self, services: Services, campaign: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._services = services
        self._team = services.settings.team
        self._campaign = campaign
        self._clock = clock
        self._artifacts: dict[str, UUID] = {}
        self._thumbnails: Thumbnails = {}
        self._shown: tuple[float, float] | None = None  # when, and which percentage
        self._counts = {"contact-sheet": 0, "failures": 0}  # of the published artifacts
        self._due = {"contact-sheet": 0.0, "failures": 0.0}
        self._status: str | None = None
        self._opened: tuple[float, int] = (clock(), 0)  # when, and how many pictures there were

    def open(self, progress: Progress, labels: Sequence[str]) -> None:
        """Name and tag the run so that a person finds it, and emit its start event."""
        from prefect.client.orchestration import get_client
        from prefect.runtime import flow_run

        self._opened = (self._clock(), progress.images)
        with best_effort(), get_client(sync_client=True) as client:
            name = f"{progress.name} · v{progress.version} · {progress.total} jobs"
            client.update_flow_run(UUID(flow_run.get_id()), name=name, tags=labels)
            soon = f"# {progress.name}\n\nThe report is written here when the run ends."
            self._put("report", soon, describe(progress))
        events.emit_campaign_event(CampaignEvent.STARTED, self._team, progress)
        self._status = "active"

    def show(self, progress: Progress, *, now: bool = False) -> None:
        """Update progress at most every five seconds, the rest at most every fifteen; report a pause at once."""
        if turned := events.status_change(self._status, progress):
            events.emit_campaign_event(turned, self._team, progress)
        self._status = progress.status
        self._move(progress, now=now)
        self._refresh("contact-sheet", progress.images, lambda: self._put_pictures(progress), now=now)
        self._refresh("failures", progress.failed + progress.blocked, lambda: self._put_failures(progress), now=now)

    def close(self, progress: Progress) -> None:
        """Publish the final progress, pictures and failures, the closing report, and the event of the outcome."""
        self.show(progress, now=True)
        opened_at, pictures = self._opened
        span = Span(pictures=progress.images - pictures, wall_s=self._clock() - opened_at)
        with best_effort():
            self._put("report", finish_report(self._services, self._campaign, span), describe(progress))
        if ended := events.outcome(progress):
            events.emit_campaign_event(ended, self._team, progress)

    def _move(self, progress: Progress, *, now: bool) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        percentage = 100.0 * progress.succeeded / progress.total if progress.total else 100.0
        if self._shown is not None:
            when, before = self._shown
            if percentage == before or (not now and self._clock() - when < SHOW_EVERY_S):
                return
        with best_effort():
            if "progress" not in self._artifacts:
                created = create_progress_artifact(percentage, f"progress-{self._campaign}", describe(progress))
                if isinstance(created, UUID):
                    self._artifacts["progress"] = created
            else:
                update_progress_artifact(self._artifacts["progress"], percentage, describe(progress))
            self._shown = (self._clock(), percentage)

    def _refresh(self, name: str, count: int, put: Callable[[], None], *, now: bool) -> None:
        """Update an artifact that has changed and is due; the more expensive the last update, the later the next."""
        began = self._clock()
        if count == self._counts[name] or (not now and began < self._due[name]):
            return
        with best_effort():
            put()
            self._counts[name] = count
        took = self._clock() - began
        self._due[name] = began + max(REFRESH_EVERY_S, took / REFRESHING_SHARE)

    def _put_pictures(self, progress: Progress) -> None:
        sheet = newest_pictures(self._services, self._campaign, kept=self._thumbnails)
        if sheet is not None:
            url = "data:image/jpeg;base64," + base64.b64encode(sheet).decode("ascii")
            report = (
                f" · [report](/artifacts/artifact/{self._artifacts['report']})" if "report" in self._artifacts else ""
            )
            self._put("contact-sheet", url, f"The newest of {progress.images} pictures{report}")

    def _put_failures(self, progress: Progress) -> None:
        failed = [
            each | {"variables": ", ".join(map(str, each["variables"].values()))}
            for each in failures(self._services, self._campaign)
        ]
        self._put("failures", table_cells(failed), report.failure_summary(progress, shown=len(failed)))

    def _put(self, name: str, data: Any, description: str) -> None:
        """Create an artifact of this run, or update the existing one."""
        from prefect import artifacts
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import ArtifactUpdate

        key = f"{name}-{self._campaign}"
        if name in self._artifacts:
            update = ArtifactUpdate(data=data if isinstance(data, str) else json.dumps(data), description=description)
            with get_client(sync_client=True) as client:
                client.update_artifact(self._artifacts[name], update)
            return
        makers: dict[str, Callable[..., Any]] = {
            "report": artifacts.create_markdown_artifact,
            "contact-sheet": artifacts.create_image_artifact,
            "failures": artifacts.create_table_artifact,
        }
        created = makers[name](data, key=key, description=description)
        if isinstance(created, UUID):
            self._artifacts[name] = created


def table_cells(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows for a table artifact, escaped because Prefect's page renders each text cell as Markdown."""
    return [{name: markdown(value) if isinstance(value, str) else value for name, value in row.items()} for row in rows]


def describe(progress: Progress) -> str:
    """Return the job counts in one line."""
    counts = {name: getattr(progress, name) for name in ("failed", "blocked", "skipped", "cancelled")}
    unsuccessful = "".join(f", {count} {name}" for name, count in counts.items() if count)
    return f"{progress.name}: {progress.succeeded} of {progress.total} succeeded{unsuccessful}"
