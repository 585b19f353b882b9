"""What every test tier shares: an offline, quiet environment and the rule that nothing skips in CI."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

from sdpipeline.orchestration.local_server import own_server

# Set before any test module imports the libraries that read them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL="CRITICAL",
    OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "2"),
    OMP_WAIT_POLICY="PASSIVE",
)

# A busy machine is slow now and then, which says nothing about the code.
hypothesis.settings.register_profile(
    "sdpipeline", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("sdpipeline")

REQUIRE_ALL = os.environ.get("SDP_TEST_REQUIRE_ALL") == "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under SDP_TEST_REQUIRE_ALL=1 a skipped test has failed; only a GPU may be missing."""
    report = yield
    if REQUIRE_ALL and _skipped(report) and item.get_closest_marker("gpu") is None:
        report.outcome = "failed"
        report.longrepr = f"skipped although SDP_TEST_REQUIRE_ALL=1: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that skips as a whole while it is imported."""
    report = yield
    if REQUIRE_ALL and _skipped(report):
        report.outcome = "failed"
        report.longrepr = f"skipped although SDP_TEST_REQUIRE_ALL=1: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home whose own Prefect server runs until the last test; starting one takes ten seconds."""
    home = tmp_path_factory.mktemp("prefect-home")
    with own_server(home, keep=True) as server:
        pass
    yield home
    assert server.pid is not None
    os.killpg(server.pid, signal.SIGKILL)


def _skipped(report: pytest.TestReport | pytest.CollectReport) -> bool:
    return report.outcome == "skipped" and not hasattr(report, "wasxfail")
