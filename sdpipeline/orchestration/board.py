"""What the Prefect UI shows of a campaign's run; showing is not working, and fails without harm."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from uuid import UUID

import structlog

from sdpipeline import bootstrap
from sdpipeline.bootstrap import Progress
from sdpipeline.settings import Settings

SHOW_EVERY_S = 5.0

log = structlog.get_logger(__name__)


@contextmanager
def shown() -> Iterator[None]:
    """Showing is not working: a Prefect server that is away costs the picture of the work, not the work."""
    import httpx
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):  # five would hold the watch up for a minute
            yield
    except httpx.HTTPError as error:
        log.warning("prefect.unreachable", error=repr(error))


class Board:
    """The artifacts of one campaign run: a progress bar that moves, then contact sheet, failures and report."""

    def __init__(self, campaign: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._campaign = campaign
        self._clock = clock
        self._progress_id: UUID | None = None
        self._shown: tuple[float, float] | None = None  # when, and which percentage

    def open(self, progress: Progress, labels: Sequence[str]) -> None:
        """Name and tag the run so that a person finds it."""
        from prefect.client.orchestration import get_client
        from prefect.runtime import flow_run

        with shown(), get_client(sync_client=True) as client:
            name = f"{progress.name} · v{progress.version} · {progress.total} jobs"
            client.update_flow_run(UUID(flow_run.get_id()), name=name, tags=labels)

    def show(self, progress: Progress, *, now: bool = False) -> None:
        """Move the progress artifact, at most every five seconds."""
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        percentage = 100.0 * progress.finished / progress.total if progress.total else 100.0
        if self._shown is not None:
            when, before = self._shown
            if percentage == before or (not now and self._clock() - when < SHOW_EVERY_S):
                return
        with shown():
            if self._progress_id is None:
                created = create_progress_artifact(percentage, f"progress-{self._campaign}", describe(progress))
                self._progress_id = created if isinstance(created, UUID) else None
            else:
                update_progress_artifact(self._progress_id, percentage, describe(progress))
            self._shown = (self._clock(), percentage)

    def close(self, settings: Settings, progress: Progress) -> None:
        """The last progress, the newest pictures, what failed, and the closing report."""
        from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

        self.show(progress, now=True)
        sheet = bootstrap.contact_sheet(settings, self._campaign)
        failed = bootstrap.failures(settings, self._campaign)
        report = bootstrap.finish_report(settings, self._campaign)
        with shown():
            if sheet is not None:
                url = "data:image/jpeg;base64," + base64.b64encode(sheet).decode("ascii")
                create_image_artifact(url, key=f"contact-sheet-{self._campaign}", description="The newest pictures")
            if failed:
                create_table_artifact(failed, key=f"failures-{self._campaign}", description="Jobs that failed")
            create_markdown_artifact(report, key=f"report-{self._campaign}", description=describe(progress))


def describe(progress: Progress) -> str:
    """What became of the jobs, in one line."""
    counts = {name: getattr(progress, name) for name in ("failed", "blocked", "skipped", "cancelled")}
    unlucky = "".join(f", {count} {name}" for name, count in counts.items() if count)
    return f"{progress.name}: {progress.succeeded} of {progress.total} succeeded{unlucky}"
