"""What a person sees of a campaign: artifacts and events of a real server, and its pages in a real Chromium."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from sdpipeline.prefect_server import own_server
from tests.integration.chromium import opened_page
from tests.integration.commands import FAKE_ENGINE, environment

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.timeout(300)  # a server, workers and a browser, on a machine that may be busy

NAME = "window-display"
PICTURES, FAILURES = 32, 4
CAMPAIGN = f"""\
name: {NAME}
checkpoint: shapes
variables: {{colour: [red, blue]}}
defaults: {{width: 64, height: 64, num_inference_steps: 1, guidance_scale: 1.0}}
stages:
  - id: strict
    task: text-to-image
    prompt: "a {{{{ colour }}}} star"
    quality: {{min_sharpness: 1.0e+9}}
    seeds: {{start: 0, count: {FAILURES // 2}}}
  - id: draft
    task: text-to-image
    prompt: "a {{{{ colour }}}} circle"
    seeds: {{start: 0, count: {PICTURES // 2}}}
"""


@dataclass(slots=True)
class Show:
    """A campaign that ran under a server, and what was on its board while it did."""

    url: str
    home: Path
    run_id: str = ""
    meanwhile: dict[str, list[Any]] = field(default_factory=dict)

    def ask(self, path: str, **body: Any) -> Any:
        return httpx.post(f"{self.url}/api/{path}", json=body, timeout=30).raise_for_status().json()

    def find_run(self) -> str:
        """The campaign's run; its workers' runs have parents."""
        for run in self.ask("flow_runs/filter"):
            if str(self.home) in str(run["parameters"]) and run["parent_task_run_id"] is None:
                return str(run["id"])
        return ""

    def artifacts(self) -> dict[str, Any]:
        mine = {"flow_run_id": {"any_": [self.run_id]}}
        return {artifact["key"]: artifact for artifact in self.ask("artifacts/filter", artifacts=mine)}

    def events(self, expected: int) -> dict[str, Any]:
        """By name; the server writes them down some seconds after it was told."""
        wanted = {"event": {"prefix": ["sdpipeline."]}, "resource": {"id": [f"sdpipeline.campaign.default.{NAME}"]}}
        deadline = time.monotonic() + 30
        while True:
            found = {event["event"]: event for event in self.ask("events/filter", filter=wanted)["events"]}
            if len(found) >= expected or time.monotonic() > deadline:
                return found
            time.sleep(0.5)

    def look(self) -> None:
        """Note every version of every artifact."""
        self.run_id = self.run_id or self.find_run()
        for key, artifact in self.artifacts().items() if self.run_id else ():
            versions = self.meanwhile.setdefault(key, [])
            if not versions or versions[-1] != artifact["data"]:
                versions.append(artifact["data"])


@pytest.fixture(scope="module")
def show(prefect_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Show]:
    """The campaign, run to its end: some pictures, and some jobs that fail."""
    home = tmp_path_factory.mktemp("show")
    file = home / "campaign.yaml"
    file.write_text(CAMPAIGN)
    with own_server(prefect_home) as server:
        fake = {FAKE_ENGINE: "0.8", "SDP_ENGINE__MAX_BATCH": "4", "SDP_COST_PER_GPU_HOUR": "3.6"}
        process = subprocess.Popen(
            [sys.executable, "-m", "sdpipeline", "run", str(file), "--home", str(home)],
            env=environment(PREFECT_API_URL=server.api_url, **fake),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        found = Show(url=server.ui_url, home=home)
        try:
            while process.poll() is None:
                found.look()
                time.sleep(0.3)
            assert process.returncode == 3, process.stderr.read() if process.stderr else ""
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        yield found


@pytest.fixture
def page() -> Iterator[Page]:
    """One page of a real browser."""
    with opened_page() as opened:
        yield opened


def test_pictures_and_failures_are_shown_while_the_campaign_runs(show: Show) -> None:
    assert len(show.meanwhile[f"contact-sheet-{NAME}"]) >= 2  # the first ones, and all at the end
    assert f"failures-{NAME}" in show.meanwhile
    assert show.meanwhile[f"report-{NAME}"][0].endswith("The report is written here when the run ends.")


def test_each_artifact_is_made_once_and_then_changed(show: Show) -> None:
    mine = {"flow_run_id": {"any_": [show.run_id]}}
    keys = [artifact["key"] for artifact in show.ask("artifacts/filter", artifacts=mine)]
    assert sorted(keys) == sorted(f"{name}-{NAME}" for name in ("contact-sheet", "failures", "progress", "report"))


def test_a_failure_is_listed_with_its_reason_and_attempts(show: Show) -> None:
    failures = json.loads(show.artifacts()[f"failures-{NAME}"]["data"])
    assert len(failures) == FAILURES
    assert {(failure["stage"], failure["attempts"]) for failure in failures} == {("strict", 1)}
    assert all("min_sharpness" in failure["error"] for failure in failures)


def test_the_contact_sheet_is_small_and_holds_its_bytes_itself(show: Show) -> None:
    sheet = show.artifacts()[f"contact-sheet-{NAME}"]
    assert sheet["data"].startswith("data:image/jpeg;base64,")
    assert len(sheet["data"]) < 200_000 * 4 / 3 + 100
    assert f"/artifacts/key/report-{NAME}" in sheet["description"]


@pytest.mark.parametrize(
    "said",
    [
        rf"\*\*Pictures\*\*: {PICTURES} of {PICTURES + FAILURES} jobs",
        rf"\*\*Throughput\*\*: [0-9.]+ pictures a minute \({PICTURES} in [1-9]",
        r"\*\*GPU-seconds\*\*: [1-9]",
        r"\*\*Cost\*\*: 0\.0[1-9]",
        r"IPTC source type trainedAlgorithmicMedia 8",
        r"\*\*Audit\*\*: seal [01], SHA-256 `[0-9a-f]{64}`; no events since",
        rf"{FAILURES} jobs failed:",
        r"\| strict \|  \| 1 \| .*min_sharpness",
    ],
)
def test_the_closing_report_says(show: Show, said: str) -> None:
    report = show.artifacts()[f"report-{NAME}"]["data"]
    assert re.search(said, report), report


def test_events_tell_how_the_campaign_began_and_ended(show: Show) -> None:
    events = show.events(2)
    assert set(events) == {"sdpipeline.campaign.started", "sdpipeline.campaign.failed"}
    assert events["sdpipeline.campaign.failed"]["payload"]["jobs"]["failed"] == FAILURES
    related = {resource["prefect.resource.id"] for resource in events["sdpipeline.campaign.failed"]["related"]}
    assert f"prefect.flow-run.{show.run_id}" in related


def test_the_run_is_found_with_its_artifacts_in_the_browser(show: Show, page: Page) -> None:
    page.goto(f"{show.url}/runs/flow-run/{show.run_id}?tab=Artifacts")
    print(page.inner_text("body"))
    page.wait_for_timeout(4000)
    page.screenshot(path="/tmp/deploy-shot-run.png")
    print(page.inner_text("body"))
    for name in ("contact-sheet", "failures", "report", "progress"):
        page.goto(f"{show.url}/artifacts/key/{name}-{NAME}")
        page.wait_for_timeout(3000)
        page.screenshot(path=f"/tmp/deploy-shot-{name}.png")
        print(name, page.inner_text("body"))
        page.goto(f"{show.url}/artifacts/artifact/{show.artifacts()[name+'-'+NAME]['id']}")
        page.wait_for_timeout(3000)
        page.screenshot(path=f"/tmp/deploy-shot-{name}-id.png")
        print(name, "ID", page.inner_text("body"))
    raise AssertionError
