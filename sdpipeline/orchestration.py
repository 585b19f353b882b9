"""Where the pipeline meets Prefect: a server, a flow run with its workers, and what the UI shows of them.

The database decides what is finished; Prefect starts, stops and shows. Prefect is imported where it is
used, after the environment it reads while being imported is set, so that commands without it stay fast.
"""

from __future__ import annotations

import base64
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import UUID

import structlog

from sdpipeline import bootstrap, crew
from sdpipeline.bootstrap import Progress, WorkerSummary
from sdpipeline.db import registry, reports
from sdpipeline.errors import (
    DatabaseUnavailableError,
    Mistake,
    OrchestratorUnavailableError,
    SettingsError,
    TransientError,
)
from sdpipeline.prefect_server import ServerHandle, answers, own_server
from sdpipeline.settings import Settings

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from prefect import Flow
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import State
    from rich.console import Console

CAMPAIGN_FLOW = "sdpipeline.flows.campaign:campaign"
CHUNK_S = 45.0
SHOW_EVERY_S = 5.0
POLL_S = 1.0
FINISH_GRACE_S = 30.0
DISPATCHER_RETRIES = 2  # waits 1 and 2 seconds; Prefect's own five would hold a Ctrl-C up for a minute
ANSWER_TIMEOUT_S = 4.0
SIGTERM_EXIT_CODE = 143

log = structlog.get_logger(__name__)


# -- running a campaign from the command line --


def run_campaign(
    settings: Settings,
    campaign: str,
    *,
    keep_ui: bool = False,
    console: Console | None = None,
    always_own: bool = False,
) -> Progress:
    """Work a submitted campaign to its end on this machine, under the campaign flow in this process.

    ``always_own`` ignores a Prefect server of one's own. With a console, progress is shown there. Ctrl-C
    and SIGTERM end the workers at once, give their leases back and leave as KeyboardInterrupt and as
    SystemExit with code 143.
    """
    progress = bootstrap.campaign_progress(settings, campaign)
    if not progress.remaining and not keep_ui:
        return progress
    with _sigterm_exits(), local_server(settings, keep_ui=keep_ui, always_own=always_own) as server:
        if console is not None:
            console.print(f"Prefect UI: {server.ui_url}")
        with _live_progress(settings, campaign, console):
            _run_flow(settings, campaign)
        if console is not None and keep_ui and server.pid is not None:
            console.print(f"Prefect stays at {server.ui_url}; to stop it: kill {server.pid}")
    return bootstrap.campaign_progress(settings, campaign)


@contextmanager
def local_server(settings: Settings, *, keep_ui: bool = False, always_own: bool = False) -> Iterator[ServerHandle]:
    """The Prefect server to use, named in this process's environment: PREFECT_API_URL, or the home's own."""
    url = None if always_own else settings.prefect_api_url
    if url is not None:
        with _environment(_prefect_environment(url)):
            _expect_answer(url)
            yield ServerHandle(api_url=url, ui_url=url.removesuffix("/api"), started=False)
        return
    with own_server(settings.home, keep=keep_ui) as server:
        own = {"PREFECT_HOME": str(settings.home / "prefect")}
        with _environment(_prefect_environment(server.api_url) | own):
            yield server


def _prefect_environment(api_url: str) -> dict[str, str]:
    return {
        "PREFECT_API_URL": api_url,
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Prefect's log lines would tear the progress bar and the JSON; the UI and the log files have them.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": os.environ.get("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30"),
    }


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """These variables for the block, for children, and for a prefect that is already imported."""
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
    """Refuse a server that a setting names and that does not answer, within 15 seconds."""
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
            refuse("it wants credentials", "set PREFECT_API_AUTH_STRING or PREFECT_API_KEY")
        refuse(error, "check that the address ends in /api and that the server is a Prefect 3 server")
    except (httpx.HTTPError, httpx.InvalidURL, RuntimeError, ValueError) as error:
        refuse(repr(error), "check the address and that the server runs, or unset PREFECT_API_URL")


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """SIGTERM unwinds the block as Ctrl-C does; without this, a server it started would stay behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> NoReturn:
        raise SystemExit(SIGTERM_EXIT_CODE)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_flow(settings: Settings, campaign: str) -> None:
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.flow_engine import run_flow
    from prefect.flows import load_flow_from_entrypoint
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    flow: Flow[..., Any] = load_flow_from_entrypoint(CAMPAIGN_FLOW)
    parameters = {"name": campaign, "home": str(settings.home)}
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: DISPATCHER_RETRIES}):
        with get_client(sync_client=True) as client:
            flow_run = client.create_flow_run(flow, parameters=parameters)
        try:
            run_flow(flow, flow_run=flow_run, parameters=parameters)
        except (KeyboardInterrupt, SystemExit):
            _cancel(flow_run.id)
            raise
        except httpx.HTTPError as error:
            _pass_on_interruption(error)
            if bootstrap.campaign_progress(settings, campaign).remaining:
                raise OrchestratorUnavailableError(
                    f"the Prefect server was lost: {error!r}; run again to go on"
                ) from error
            log.warning("prefect.unreachable", error=repr(error))  # the work is done, only nobody could be told
        finally:
            _flush()


def _pass_on_interruption(error: BaseException) -> None:
    """Prefect fails to report an interruption to a server that is away, and raises that instead."""
    from prefect.exceptions import TerminationSignal

    while error.__context__ is not None:
        error = error.__context__
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        if isinstance(error, TerminationSignal):
            raise SystemExit(SIGTERM_EXIT_CODE) from error


def _cancel(flow_run_id: UUID) -> None:
    """Prefect calls a signal a crash; it was somebody's wish."""
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelled

    with _shown(), get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id, Cancelled(message="stopped by a signal"), force=True)


def _flush() -> None:
    """Send what Prefect still buffers while the server is there to take it."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogHandler

    if answers(os.environ["PREFECT_API_URL"]):
        APILogHandler().flush()
        EventsWorker.drain_all(timeout=5)


@contextmanager
def _live_progress(settings: Settings, campaign: str, console: Console | None) -> Iterator[None]:
    """A progress bar for people, drawn from the database by a thread of its own."""
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

        def draw() -> None:
            with suppress(DatabaseUnavailableError):
                now = bootstrap.campaign_progress(settings, campaign)
                bar.update(line, completed=now.finished, total=now.total, description=_describe(now))

        def keep_drawing() -> None:
            while not stop.wait(POLL_S):
                draw()

        thread = threading.Thread(target=keep_drawing, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            draw()


# -- the campaign flow --


def work_off(settings: Settings, campaign: str, *, worker_flow: Flow[..., Any]) -> State[None]:
    """Start a worker per device, watch them until the database says finished or paused, and show it all.

    Returns the state the flow run ends in. Called inside the campaign flow's run.
    """
    from prefect import tags

    progress = bootstrap.campaign_progress(settings, campaign)
    board = _Board(campaign)
    labels = _tags(settings, progress)
    board.open(progress, labels)
    with tags(*labels):
        workers = crew.Crew(
            slots=crew.slots(settings),
            spawn=lambda slot, name: _spawn(settings, campaign, worker_flow, slot, name),
            bury=lambda death: _bury(settings, campaign, death),
        )
        progress = _watch(settings, campaign, workers, board)
    try:
        bootstrap.seal(settings)
    except TransientError as error:
        log.warning("audit.unsealed", error=str(error))  # the next seal covers these events too
    board.close(settings, progress)
    return _closing_state(progress)


def _watch(settings: Settings, campaign: str, workers: crew.Crew, board: _Board) -> Progress:
    try:
        workers.start()
        while True:
            progress = bootstrap.campaign_progress(settings, campaign)
            board.show(progress)
            if not progress.remaining or (progress.status == "paused" and not progress.leased):
                break
            workers.tend(ready=progress.ready, finished=progress.finished)
            workers.wait(POLL_S)
        workers.finish(FINISH_GRACE_S)
    except BaseException:  # a Ctrl-C above all: whatever ends the watch ends the watched
        _end(settings, campaign, workers)
        raise
    return bootstrap.campaign_progress(settings, campaign)


def _end(settings: Settings, campaign: str, workers: crew.Crew) -> None:
    from prefect.states import Cancelled

    for stopped in workers.stop():
        # A worker that was told to end gave its leases back; one that had to be killed could not.
        returned = bootstrap.release_worker_leases(settings, stopped.pid)
        log.info("worker.stopped", name=stopped.name, pid=stopped.pid, leases_returned=returned)
        with _shown():
            _close_run(f"{campaign} · {stopped.name}", Cancelled(message="the campaign's run was stopped"))


def _spawn(settings: Settings, campaign: str, worker_flow: Flow[..., Any], slot: crew.Slot, name: str) -> BaseProcess:
    from prefect.flow_engine import run_flow_in_subprocess

    (settings.home / "logs").mkdir(parents=True, exist_ok=True)
    return run_flow_in_subprocess(
        worker_flow.with_options(flow_run_name=f"{campaign} · {name}"),
        parameters={
            "campaign": campaign,
            "home": str(settings.home),
            "device": slot.device,
            "log_file": str(settings.home / "logs" / f"worker-{slot.index}.log"),
        },
        # A worker that starts while the server restarts waits for it longer than the dispatcher may.
        env={**slot.environment, "PREFECT_CLIENT_MAX_RETRIES": "5"},
    )


def _bury(settings: Settings, campaign: str, death: crew.Death) -> None:
    """A worker died: its leases go back to the queue, and its run stops looking alive."""
    from prefect.states import Crashed

    returned = bootstrap.release_worker_leases(settings, death.pid)
    log.warning("worker.died", name=death.name, pid=death.pid, exit_code=death.exit_code, leases_returned=returned)
    with _shown():
        _close_run(f"{campaign} · {death.name}", Crashed(message=str(death)))


def _close_run(name: str, state: State[Any]) -> None:
    """Put this run's child of that name, and its tasks, into that state, whatever it says itself unless it is done."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas import filters
    from prefect.runtime import flow_run

    child = filters.FlowRunFilter(
        parent_flow_run_id=filters.FlowRunFilterParentFlowRunId(any_=[UUID(flow_run.get_id())]),
        name=filters.FlowRunFilterName(any_=[name]),
    )
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=child):
            if run.state is None or not run.state.is_completed():
                _close_tasks(client, run.id, state)
                client.set_flow_run_state(run.id, state, force=True)


def _close_tasks(client: SyncPrefectClient, run_id: UUID, state: State[Any]) -> None:
    from prefect.client.schemas import filters

    of_run = filters.FlowRunFilter(id=filters.FlowRunFilterId(any_=[run_id]))
    for task_run in client.read_task_runs(flow_run_filter=of_run):
        if task_run.state is None or not task_run.state.is_final():
            client.set_task_run_state(task_run.id, state, force=True)


def _closing_state(progress: Progress) -> State[None]:
    from prefect.states import Completed

    if progress.status == "paused" and progress.remaining:
        return Completed(name="Paused", message=f"paused with {progress.remaining} of {progress.total} jobs to do")
    return Completed(message=_describe(progress))


def _describe(progress: Progress) -> str:
    counts = {name: getattr(progress, name) for name in ("failed", "blocked", "skipped", "cancelled")}
    unlucky = "".join(f", {count} {name}" for name, count in counts.items() if count)
    return f"{progress.name}: {progress.succeeded} of {progress.total} succeeded{unlucky}"


def _tags(settings: Settings, progress: Progress) -> Sequence[str]:
    """The campaign and its checkpoints, by the names people use."""
    with bootstrap.services(settings) as have, have.database.read() as connection:
        used = set(reports.checkpoints_of(connection, progress.id))
        aliases = {files.alias for files in registry.known(connection) if {files.alias, files.digest} & used}
    return [f"campaign:{progress.name}", *(f"checkpoint:{alias}" for alias in sorted(aliases))]


# -- what the UI shows --


@contextmanager
def _shown() -> Iterator[None]:
    """Showing is not working: a Prefect server that is away costs the picture of the work, not the work."""
    import httpx
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):  # five would hold the watch up for a minute
            yield
    except httpx.HTTPError as error:
        log.warning("prefect.unreachable", error=repr(error))


class _Board:
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

        with _shown(), get_client(sync_client=True) as client:
            name = f"{progress.name} · v{progress.version} · {progress.total} jobs"
            client.update_flow_run(UUID(flow_run.get_id()), name=name, tags=labels)

    def show(self, progress: Progress, *, now: bool = False) -> None:
        """Move the progress artifact, at most every five seconds."""
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        percentage = 100.0 * progress.finished / progress.total if progress.total else 100.0
        if self._shown is not None:
            when, shown = self._shown
            if percentage == shown or (not now and self._clock() - when < SHOW_EVERY_S):
                return
        with _shown():
            if self._progress_id is None:
                created = create_progress_artifact(percentage, f"progress-{self._campaign}", _describe(progress))
                self._progress_id = created if isinstance(created, UUID) else None
            else:
                update_progress_artifact(self._progress_id, percentage, _describe(progress))
            self._shown = (self._clock(), percentage)

    def close(self, settings: Settings, progress: Progress) -> None:
        """The last progress, the newest pictures, what failed, and the closing report."""
        from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

        self.show(progress, now=True)
        sheet = bootstrap.contact_sheet(settings, self._campaign)
        failed = bootstrap.failures(settings, self._campaign)
        report = bootstrap.finish_report(settings, self._campaign)
        with _shown():
            if sheet is not None:
                url = "data:image/jpeg;base64," + base64.b64encode(sheet).decode("ascii")
                create_image_artifact(url, key=f"contact-sheet-{self._campaign}", description="The newest pictures")
            if failed:
                create_table_artifact(failed, key=f"failures-{self._campaign}", description="Jobs that failed")
            create_markdown_artifact(report, key=f"report-{self._campaign}", description=_describe(progress))


# -- the gpu-worker flow --


@contextmanager
def worker_process(log_file: str | None) -> Iterator[threading.Event]:
    """Make this flow run's process a worker's: output to its log file, and SIGTERM gives leases back first.

    The event is set when the worker must end. Prefect's own SIGTERM handler, which runs after it, raises
    in this thread: the batch is left at once, and a lease whose worker was told to stop loses no attempt.
    """
    if log_file is not None:
        _redirect_output(Path(log_file))
    stop = threading.Event()
    prefects = signal.getsignal(signal.SIGTERM)

    def on_sigterm(signum: int, frame: Any) -> None:
        first = not stop.is_set()
        stop.set()
        if first and callable(prefects):
            prefects(signum, frame)

    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, prefects)


def work_in_chunks(work: Callable[[int], WorkerSummary], stop: threading.Event) -> None:
    """Call ``work`` until it reports that nothing is left, the worker must end, or nobody watches it any more."""
    for number in itertools.count(1):
        if work(number).idle or stop.is_set() or _orphaned():
            return


def _orphaned() -> bool:
    """Whether the dispatcher that started this process is gone; the next one starts workers of its own."""
    parent = parent_process()
    return parent is not None and not parent.is_alive()


def _redirect_output(path: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
