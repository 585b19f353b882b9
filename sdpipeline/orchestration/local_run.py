"""Run of a campaign on this machine: the Prefect server to use, and the flow run in this process.

The database decides what is finished; Prefect starts, stops and displays runs. Prefect is imported where it is used,
after the environment that it reads on import is set, so that commands without it stay fast.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import UUID

import structlog

from sdpipeline.app.queries import campaign_progress
from sdpipeline.app.services import Services
from sdpipeline.db.queries import Progress
from sdpipeline.errors import (
    DatabaseUnavailableError,
    ForeignResultError,
    Mistake,
    OrchestratorUnavailableError,
    RunForcedError,
    SettingsError,
)
from sdpipeline.orchestration.artifacts import best_effort, describe
from sdpipeline.orchestration.local_server import ServerHandle, answers, no_proxy_for_loopback, own_server
from sdpipeline.settings import Settings
from sdpipeline.shutdown import SIGTERM_EXIT_CODE, exit_on_sigterm

if TYPE_CHECKING:
    from prefect import Flow
    from rich.console import Console

CAMPAIGN_FLOW = "sdpipeline.flows.campaign:campaign_here"
DRAW_EVERY_S = 1.0
SAY_EVERY_S = 15.0
ANSWER_TIMEOUT_S = 4.0
DISPATCHER_RETRIES = 2  # waits 1 and 2 seconds; Prefect's own five would delay a Ctrl-C by a minute

log = structlog.get_logger(__name__)


def run_campaign(
    services: Services,
    campaign: str,
    *,
    keep_ui: bool = False,
    console: Console | None = None,
    always_own: bool = False,
) -> Progress:
    """Run a submitted campaign to its end on this machine, under the campaign flow in this process.

    ``always_own`` ignores a Prefect server that the environment names. With a console, progress is shown there. Ctrl-C
    and SIGTERM end the workers at once and release their leases; they propagate as KeyboardInterrupt and as SystemExit
    with code 143.
    """
    settings = services.settings
    progress = campaign_progress(services, campaign)
    if not progress.remaining and not keep_ui:
        return progress
    with exit_on_sigterm(), prefect_server(settings, keep_ui=keep_ui, always_own=always_own) as server:
        if console is not None:
            console.print(f"Prefect UI: {server.ui_url}{_password_hint(server)}")
        with _live_progress(services, campaign, console):
            _run_flow(services, campaign)
        if console is not None and keep_ui and server.pid is not None:
            console.print(f"Prefect stays at {server.ui_url}{_password_hint(server)}; to stop it: kill {server.pid}")
    return campaign_progress(services, campaign)


def _password_hint(server: ServerHandle) -> str:
    return f" (password in {server.password_file})" if server.password_file else ""


@contextmanager
def prefect_server(settings: Settings, *, keep_ui: bool = False, always_own: bool = False) -> Iterator[ServerHandle]:
    """Yield the Prefect server to use, PREFECT_API_URL or the home's own, and set it in this process's environment."""
    url = None if always_own else settings.prefect_api_url
    if url is not None:
        with _environment(_prefect_environment(url) | no_proxy_for_loopback() | _home(settings)):
            _expect_answer(url)
            yield ServerHandle(api_url=url, ui_url=url.removesuffix("/api"), started=False)
        return
    with own_server(settings.home, keep=keep_ui) as server:
        own = {"PREFECT_HOME": str(settings.home / "prefect")} | _home(settings)
        with _environment(_prefect_environment(server.api_url) | server.environment | own):
            yield server


def _home(settings: Settings) -> dict[str, str]:
    """Return HOME, which Prefect reads on import and which a container's user may lack."""
    return {"HOME": os.environ.get("HOME") or str(settings.home)}


def _prefect_environment(api_url: str) -> dict[str, str]:
    return {
        "PREFECT_API_URL": api_url,
        "DO_NOT_TRACK": "1",
        "PYTHONSAFEPATH": "1",  # workers import nothing from the current folder, where others may write
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Prefect's log lines would break the progress bar and the JSON; the UI and the log files have them.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": os.environ.get("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30"),
    }


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set these variables for the block, for child processes, and for an already imported prefect."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        from prefect.context import SettingsContext
        from prefect.settings import Settings as PrefectSettings
        from prefect.settings import get_current_settings, load_current_profile

        get_current_settings()
        with SettingsContext(profile=load_current_profile(), settings=PrefectSettings()):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _expect_answer(url: str) -> None:
    """Raise SettingsError if the server that a setting names does not answer within 15 seconds."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    def refuse(reason: object, fix: str) -> NoReturn:
        raise SettingsError(
            Mistake(key="PREFECT_API_URL", message=f"the Prefect server at {url} does not answer: {reason}", fix=fix)
        )

    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(httpx_settings={"timeout": ANSWER_TIMEOUT_S}, sync_client=True) as client,
        ):
            client.count_flow_runs()
    except httpx.HTTPStatusError as error:
        if error.response.status_code in {401, 403}:
            refuse("it requires credentials", "set PREFECT_API_AUTH_STRING or PREFECT_API_KEY")
        refuse(error, "check that the address ends in /api and that the server is a Prefect 3 server")
    except (httpx.HTTPError, httpx.InvalidURL, RuntimeError, ValueError) as error:
        refuse(repr(error), "check the address and that the server runs, or unset PREFECT_API_URL")


def _run_flow(services: Services, campaign: str) -> None:
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import CancelledRun, CrashedRun, FailedRun, MissingResult, UnfinishedRun
    from prefect.flow_engine import run_flow
    from prefect.flows import load_flow_from_entrypoint
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    flow: Flow[..., Any] = load_flow_from_entrypoint(CAMPAIGN_FLOW)
    parameters = {"name": campaign, "home": str(services.settings.home)}
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: DISPATCHER_RETRIES}):
        with get_client(sync_client=True) as client:
            flow_run = client.create_flow_run(flow, parameters=parameters)
        try:
            if (found := run_flow(flow, flow_run=flow_run, parameters=parameters)) is not None:
                _expect_an_end(services, campaign, f"its result is {found!r:.80}")  # our flows return nothing
        except (KeyboardInterrupt, SystemExit):
            _cancel(flow_run.id)
            raise
        except (FailedRun, CancelledRun, CrashedRun, MissingResult, UnfinishedRun, ForeignResultError) as error:
            _expect_an_end(services, campaign, error)  # the flow's own state is Failed if jobs failed
        except httpx.HTTPError as error:
            _pass_on_interruption(error)
            if campaign_progress(services, campaign).remaining:
                raise OrchestratorUnavailableError(
                    f"the Prefect server was lost: {error!r}; run again to go on"
                ) from error
            log.warning("prefect_unavailable", error=repr(error))  # all work is done, but not reported
        finally:
            _flush()


def _expect_an_end(services: Services, campaign: str, how: object) -> None:
    """Raise RunForcedError if the run was given its final state from outside before the work was done."""
    progress = campaign_progress(services, campaign)
    if progress.remaining and progress.status != "paused":
        raise RunForcedError(
            f"the Prefect run of {campaign} was ended from outside with {progress.remaining} jobs to do "
            f"({how}); run again to go on"
        ) from (how if isinstance(how, Exception) else None)


def _pass_on_interruption(error: BaseException) -> None:
    """Re-raise the interruption that Prefect masked with its error of reporting to an unreachable server."""
    from prefect.exceptions import TerminationSignal

    while error.__context__ is not None:
        error = error.__context__
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        if isinstance(error, TerminationSignal):
            raise SystemExit(SIGTERM_EXIT_CODE) from error


def _cancel(flow_run_id: UUID) -> None:
    """Set the run to Cancelled, because Prefect reports a signal as a crash although a user asked for it."""
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelled

    with best_effort(), get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id, Cancelled(message="stopped by a signal"), force=True)


def _flush() -> None:
    """Send the logs and events that Prefect still buffers, while the server runs."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogHandler

    if answers(os.environ["PREFECT_API_URL"]):
        APILogHandler().flush()
        EventsWorker.drain_all(timeout=5)


@contextmanager
def _live_progress(services: Services, campaign: str, console: Console | None) -> Iterator[None]:
    """Show a progress bar on the console, updated from the database by a separate thread."""
    if console is None:
        yield
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    stop = threading.Event()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        line = bar.add_task(campaign, total=None)

        said = [time.monotonic()]

        def draw() -> None:
            with suppress(DatabaseUnavailableError):
                now = campaign_progress(services, campaign)
                bar.update(line, completed=now.finished, total=now.total, description=describe(now))
                if not console.is_terminal and time.monotonic() - said[0] >= SAY_EVERY_S:
                    console.print(describe(now))  # in a file, a bar appears only at its end
                    said[0] = time.monotonic()

        def keep_drawing() -> None:
            while not stop.wait(DRAW_EVERY_S):
                draw()

        thread = threading.Thread(target=keep_drawing, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            draw()
