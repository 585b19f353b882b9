"""Campaign artifacts and events on a real Prefect server, and its pages in a real Chromium."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from playwright.sync_api import expect
from prefect.utilities.callables import parameter_schema

from sdpipeline.flows.campaign import campaign
from sdpipeline.orchestration.artifacts import REFRESH_EVERY_S
from sdpipeline.orchestration.local_server import ServerHandle, own_server
from tests.integration.chromium import opened_page
from tests.integration.commands import FAKE_ENGINE, credentials, environment

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.timeout(300)  # a server, workers and a browser, on a machine that may be busy

NAME = "window-display"
PICTURES, FAILURES = 32, 4
CAMPAIGN = f"""\
name: {NAME}
checkpoint: shapes
variables: {{colour: [red, blue]}}
defaults: {{width: 128, height: 128, num_inference_steps: 16, guidance_scale: 4.0}}
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


SCREENSHOTS = os.environ.get("SDP_TEST_SCREENSHOTS")
"""A folder for the documentation's screenshots, which show real pictures."""


@dataclass(slots=True)
class Show:
    """A campaign that runs under a server, and the artifacts seen during the run."""

    server: ServerHandle
    home: Path
    process: subprocess.Popen[bytes]
    watch: threading.Thread | None = None
    automation_id: str = ""
    run_id: str = ""
    meanwhile: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.server.ui_url

    def ask(self, path: str, **body: Any) -> Any:
        known = credentials(self.server)
        return httpx.post(f"{self.url}/api/{path}", json=body, auth=known, timeout=30).raise_for_status().json()

    def run(self) -> Any:
        known = credentials(self.server)
        return httpx.get(f"{self.url}/api/flow_runs/{self.run_id}", auth=known).raise_for_status().json()

    def find_run(self) -> str:
        """The id of the campaign's run; its workers' runs have parents."""
        for run in self.ask("flow_runs/filter"):
            if str(self.home) in str(run["parameters"]) and run["parent_task_run_id"] is None:
                return str(run["id"])
        return ""

    def artifacts(self) -> dict[str, Any]:
        mine = {"flow_run_id": {"any_": [self.run_id]}}
        return {artifact["key"]: artifact for artifact in self.ask("artifacts/filter", artifacts=mine)}

    def artifact_page(self, name: str) -> str:
        return f"{self.url}/artifacts/artifact/{self.artifacts()[f'{name}-{NAME}']['id']}"

    def events(self, expected: int) -> dict[str, Any]:
        """The campaign's events, by name."""
        wanted = {
            "event": {"prefix": ["sdpipeline."]},
            "resource": {"id": [f"sdpipeline.campaign.default.{NAME}"]},
        }
        return {event["event"]: event for event in self.written_down(wanted, expected)}

    def written_down(self, wanted: dict[str, Any], expected: int) -> list[Any]:
        """Events on the server, which stores them some seconds after it received them."""
        deadline = time.monotonic() + 30
        while True:
            found: list[Any] = self.ask("events/filter", filter=wanted)["events"]
            if len(found) >= expected or time.monotonic() > deadline:
                return found
            time.sleep(0.5)

    def look(self) -> None:
        """Record every version of every artifact until the command has ended."""
        while self.process.poll() is None:
            self.run_id = self.run_id or self.find_run()
            for key, artifact in self.artifacts().items() if self.run_id else ():
                versions = self.meanwhile.setdefault(key, [])
                if not versions or versions[-1] != artifact["data"]:
                    versions.append(artifact["data"])
            time.sleep(0.3)

    def wait_for(self, name: str) -> None:
        while f"{name}-{NAME}" not in self.meanwhile:
            assert self.process.poll() is None, (self.home / "output").read_text()
            time.sleep(0.1)


def documented_automation() -> dict[str, Any]:
    """The automation in the documentation, without its notification."""
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "prefect-ui.md").read_text()
    text = "name: Page" + page.partition("```yaml\nname: Page")[2].partition("```")[0]
    found: dict[str, Any] = yaml.safe_load(text)
    return found | {"actions": [{"type": "do-nothing"}]}


@pytest.fixture(scope="module")
def started(prefect_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Show]:
    """The campaign during its run: some pictures exist, and some jobs fail."""
    home = tmp_path_factory.mktemp("show")
    file = home / "campaign.yaml"
    file.write_text(CAMPAIGN)
    engine = {} if SCREENSHOTS else {FAKE_ENGINE: "1.0"}
    own = {"SDP_ENGINE__MAX_BATCH": "4", "SDP_COST_PER_GPU_HOUR": "3.6"}
    with own_server(prefect_home) as server, (home / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sdpipeline", "run", str(file), "--home", str(home)],
            env=environment(**server.environment, **own, **engine),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        show = Show(server=server, home=home, process=process)
        show.automation_id = show.ask("automations/", **documented_automation())["id"]
        show.watch = threading.Thread(target=show.look, daemon=True)
        show.watch.start()
        try:
            yield show
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            show.watch.join()


@pytest.fixture(scope="module")
def show(started: Show) -> Show:
    """The same campaign after its end."""
    assert started.process.wait(240) == 3, (started.home / "output").read_text()
    assert started.watch is not None
    started.watch.join()
    return started


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A page of a real browser that records the hosts it contacts."""
    with opened_page() as opened:
        yield opened


def test_the_pages_want_the_password_of_the_home(started: Show, page: Page) -> None:
    page.goto(f"{started.url}/runs")
    expect(page.get_by_text("Login").first).to_be_visible()
    page.locator("input").first.fill(str(started.server.password))
    page.get_by_role("button", name="Login").click()
    expect(page.get_by_text("Login").first).not_to_be_visible()
    page.goto(f"{started.url}/automations")
    expect(page.get_by_text("Page for campaigns").first).to_be_visible()


def photograph(page: Page, name: str) -> None:
    """Save a screenshot, if the documentation's screenshots are requested."""
    if SCREENSHOTS:
        page.wait_for_timeout(1500)  # animations come to rest
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.jpg", type="jpeg", quality=80)


def test_a_running_campaign_is_seen_to_move_in_the_browser(started: Show, page: Page) -> None:
    started.wait_for("contact-sheet")
    page.goto(f"{started.url}/runs/flow-run/{started.run_id}")
    expect(page.get_by_text("Running").first).to_be_visible()
    expect(page.get_by_text(f"{NAME} · v1 · {PICTURES + FAILURES} jobs").first).to_be_visible()
    expect(page.get_by_text("checkpoint:shapes").first).to_be_visible()
    photograph(page, "running")
    page.goto(started.artifact_page("progress"))
    expect(page.get_by_text(re.compile(r"Progress: [1-9][0-9]?(\.\d+)?%"))).to_be_visible()


def test_pictures_and_failures_are_shown_while_the_campaign_runs(show: Show) -> None:
    sheets = len(show.meanwhile[f"contact-sheet-{NAME}"])
    took_s = show.run()["total_run_time"]
    assert 2 <= sheets <= 2 + took_s / REFRESH_EVERY_S  # the first ones, all at the end, and some in between
    assert f"failures-{NAME}" in show.meanwhile
    assert show.meanwhile[f"report-{NAME}"][0].endswith("The report is written here when the run ends.")


def test_each_artifact_is_made_once_and_then_changed(show: Show) -> None:
    mine = {"flow_run_id": {"any_": [show.run_id]}}
    keys = [artifact["key"] for artifact in show.ask("artifacts/filter", artifacts=mine)]
    assert sorted(keys) == sorted(f"{name}-{NAME}" for name in ("contact-sheet", "failures", "progress", "report"))


def test_a_campaign_with_failed_jobs_ends_as_failed_and_says_how_many(show: Show) -> None:
    state = show.run()["state"]
    said = f"{NAME}: {PICTURES} of {PICTURES + FAILURES} succeeded, {FAILURES} failed"
    assert (state["type"], state["message"]) == ("FAILED", said)


def test_progress_counts_what_succeeded(show: Show) -> None:
    last = show.artifacts()[f"progress-{NAME}"]["data"]
    assert last == pytest.approx(100 * PICTURES / (PICTURES + FAILURES))


def test_a_failure_is_listed_with_its_reason_and_attempts(show: Show) -> None:
    failures = json.loads(show.artifacts()[f"failures-{NAME}"]["data"])
    assert len(failures) == FAILURES
    assert {(failure["stage"], failure["attempts"]) for failure in failures} == {("strict", 1)}
    assert all("min_sharpness" in unescape(failure["error"]) for failure in failures)


def test_the_contact_sheet_is_small_and_holds_its_bytes_itself(show: Show) -> None:
    sheet = show.artifacts()[f"contact-sheet-{NAME}"]
    assert sheet["data"].startswith("data:image/jpeg;base64,")
    assert len(sheet["data"]) < 200_000 * 4 / 3 + 100
    assert show.artifact_page("report").removeprefix(show.url) in sheet["description"]


@pytest.mark.parametrize(
    "said",
    [
        rf"\*\*Pictures\*\*: {PICTURES} of {PICTURES + FAILURES} jobs",
        rf"\*\*Throughput\*\*: [0-9.]+ pictures a minute \({PICTURES} in [1-9]",
        r"\*\*GPU-seconds\*\*: [1-9]",
        r"\*\*Cost\*\*: (?!0\.00)\d+\.\d\d",
        r"IPTC source type trainedAlgorithmicMedia 8; C2PA valid 8; signed by a development key, which nobody trusts 8",
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


def test_the_documented_automation_hears_of_a_failed_campaign(show: Show) -> None:
    wanted = {
        "event": {"prefix": ["prefect.automation.triggered"]},
        "resource": {"id": [f"prefect.automation.{show.automation_id}"]},
    }
    assert len(show.written_down(wanted, 1)) == 1


def test_the_contact_sheet_is_a_picture_in_the_browser(show: Show, page: Page) -> None:
    page.goto(show.artifact_page("contact-sheet"))
    sheet = page.locator("img[src^='data:image/jpeg']")
    expect(sheet).to_be_visible()
    assert sheet.evaluate("picture => [picture.complete, picture.naturalWidth > 500]") == [True, True]
    photograph(page, "contact-sheet")
    page.goto(show.url + str(page.get_by_role("link", name="report", exact=True).get_attribute("href")))
    expect(page.get_by_role("heading", name=f"{NAME}, version 1: finished")).to_be_visible()
    expect(page.get_by_text("trainedAlgorithmicMedia")).to_be_visible()
    photograph(page, "report")


def test_failures_are_a_table_in_the_browser(show: Show, page: Page) -> None:
    page.goto(show.artifact_page("failures"))
    expect(page.get_by_text(f"{FAILURES} jobs failed")).to_be_visible()
    expect(page.get_by_text("strict", exact=True)).to_have_count(FAILURES)
    expect(page.get_by_text("min_sharpness")).to_have_count(FAILURES)
    photograph(page, "failures")


def asked_for(schema: dict[str, Any]) -> Iterator[str]:
    """The titles of a form's fields, including those of a nested model."""
    for name, field_schema in schema["properties"].items():
        model = schema.get("definitions", {}).get(str(field_schema.get("$ref")).rpartition("/")[2])
        if model is None or "properties" not in model:
            yield field_schema.get("title", name)
        else:
            yield from asked_for({"definitions": schema["definitions"], **model})


def test_the_run_form_asks_for_each_parameter(show: Show, page: Page) -> None:
    schema = parameter_schema(campaign)
    flow_id = show.ask("flows/filter", flows={"name": {"any_": ["campaign"]}})[0]["id"]
    asked = {"name": "by-hand", "flow_id": flow_id, "parameter_openapi_schema": schema.model_dump()}
    page.goto(f"{show.url}/deployments/deployment/{show.ask('deployments/', **asked)['id']}/run?parameters={{}}")
    for title in asked_for(schema.model_dump()):
        expect(page.get_by_text(re.compile(rf"^\s*{re.escape(title)}( \(Optional\))?\s*$")).first).to_be_visible()
    photograph(page, "run-form")


def test_the_pages_ask_nobody_but_the_server(show: Show, page: Page) -> None:
    asked: set[str] = set()
    page.on("request", lambda request: asked.add(request.url))
    page.goto(f"{show.url}/runs/flow-run/{show.run_id}")
    expect(page.get_by_text("checkpoint:shapes").first).to_be_visible()
    assert asked
    assert [url for url in asked if not url.startswith((show.url, "data:", "blob:"))] == []
