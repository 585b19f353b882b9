"""Settings that all test tiers share: an offline, quiet environment, and failure instead of skips in CI."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock

from sdpipeline.orchestration.local_server import own_server

# Set before any test module imports the libraries that read them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL="CRITICAL",
    OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
    OMP_WAIT_POLICY="PASSIVE",
)

# A busy machine is slow now and then; that is not a fault of the code.
hypothesis.settings.register_profile(
    "sdpipeline", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("sdpipeline")

LONGEST_FIRST = (
    "integration/cli/test_main_job.py",
    "chaos/test_workers_die.py",
    "integration/orchestration/test_local_server.py",
    "integration/orchestration/test_prefect_campaign.py",
    "integration/engine/test_checkpoint_files.py",
    "integration/orchestration/test_prefect_gateway.py",
    "chaos/test_database_outages.py",
    "integration/bench/test_bench.py",
    "integration/orchestration/test_forced_states.py",
    "chaos/test_prefect_server_dies.py",
    "integration/db/test_queue.py",
    "integration/worker/test_delivery_process.py",
    "chaos/test_storage_fails.py",
)
"""Files that take a minute or more. Started last, one of them would keep one process busy after the others have ended.

Shorter ones are listed between them, so that files with many processes do not all run at the same time.
"""

LONG_ON_POSTGRESQL = (
    "integration/worker/test_reuse.py",
    "integration/maintenance/test_retention.py",
    "integration/maintenance/test_reconcile.py",
    "integration/maintenance/test_restore.py",
    "integration/archives/test_archiver.py",
)
"""Files on top of transitions that tests/integration/db runs on both databases. Only the long tier runs them on
PostgreSQL."""

REQUIRE_ALL = os.environ.get("SDP_TEST_REQUIRE_ALL") == "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what only the long tier runs, and run the slowest files first: a process takes one file after another."""
    for item in items:
        if _is_long_on_postgresql(item):
            item.add_marker(pytest.mark.long)
    items.sort(key=_turn)


def _is_long_on_postgresql(item: pytest.Item) -> bool:
    if not item.nodeid.removeprefix("tests/").startswith(LONG_ON_POSTGRESQL):
        return False
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return "postgresql" in parameters.values()


def _turn(item: pytest.Item) -> int:
    path = item.nodeid.removeprefix("tests/")
    return next((turn for turn, file in enumerate(LONGEST_FIRST) if path.startswith(file)), len(LONGEST_FIRST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail skipped tests under SDP_TEST_REQUIRE_ALL=1, except those that need a GPU."""
    report = yield
    if REQUIRE_ALL and _skipped(report) and item.get_closest_marker("gpu") is None:
        report.outcome = "failed"
        report.longrepr = f"skipped although SDP_TEST_REQUIRE_ALL=1: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Do the same for a module that skips as a whole when it is imported."""
    report = yield
    if REQUIRE_ALL and _skipped(report):
        report.outcome = "failed"
        report.longrepr = f"skipped although SDP_TEST_REQUIRE_ALL=1: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def prefect_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The empty database of a Prefect server, to copy: a server that has to create one takes twice as long to start.

    The suite's processes share it: the first to need it makes it, and the others wait.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / "prefect-database"
    with FileLock(shared / "prefect-database.lock"):
        if not (folder / "complete").exists():
            command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
            known = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
            subprocess.run(command, env=known | {"PREFECT_HOME": str(folder)}, check=True, capture_output=True)
            (folder / "prefect.db").chmod(0o600)
            (folder / "complete").touch()
    return folder / "prefect.db"


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory, prefect_database: Path) -> Iterator[Path]:
    """A home whose own Prefect server runs until the last test, because starting one takes ten seconds."""
    home = tmp_path_factory.mktemp("prefect-home")
    copied_into(home / "prefect", prefect_database)
    with own_server(home, keep=True) as server:
        pass
    yield home
    assert server.pid is not None
    os.killpg(server.pid, signal.SIGKILL)


def copied_into(folder: Path, file: Path) -> Path:
    """Copy a file into a folder that only its owner can access; return the folder."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.copy(file, folder)
    return folder


def _skipped(report: pytest.TestReport | pytest.CollectReport) -> bool:
    return report.outcome == "skipped" and not hasattr(report, "wasxfail")
